"""fedmpi: lockstep federated fine-tuning of language models over torch.distributed, MPI, Slurm, or one process."""

__version__ = "0.1.0"
