"""The campaign: small real runs, seeded faults at every phase of a round, and a checker that reads what all ranks noted.

    python -m tests.campaign --faults 60 --seed 0 [--out DIR] [--launchers in_process,torchrun,mpirun]
    python -m tests.campaign.chaos --minutes 30 --faults 62 [--out DIR]

Nothing of it is in the product: a probe wraps a few public functions inside each rank's process, notes events, and makes the fault.
"""
