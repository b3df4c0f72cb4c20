"""The errors a user may meet, as one tree. Every message is one line: where, what was expected, what was found, what to do.

FedmpiError
|- ConfigError          an option, a recipe, a combination of both
|- DataError            a corpus, a split, a template
|- Unreachable          a hub that did not answer
|- EvaluationError      what an evaluation needs while it runs: a service, a sandbox, a compiler
|- ModelError           a backbone, a tokenizer, an adapter
|- WorldError           launchers, ranks, placement
|- TrainingError        a client's local training
|  |- NonFinite         a loss or an update that is not finite
|  `- Stuck             no step within the deadline
|- LinkError            carrying bytes between ranks
|  |- PeerLost          the other side is gone
|  |- PeerSilent        no byte and no heartbeat within the deadline
|  |- ProtocolError     what came is not what was agreed
|  `- Aborted           another rank failed and ended the job; carries its message
|- CheckpointError      a run folder or checkpoint that cannot be used
`- QuorumLost           too few clients left to count a round
"""

_ENDED = " ended the job: "


class FedmpiError(Exception):
    """Anything that is reported as one clear line instead of a traceback."""


class ConfigError(FedmpiError):
    """An option, a recipe, or a combination of both is not possible."""


class DataError(FedmpiError):
    """A corpus, a split or a template cannot be used."""


class Unreachable(FedmpiError):
    """A hub did not give what is to be had there: the network, or the hub, failed."""


class EvaluationError(FedmpiError):
    """A service, a sandbox or a compiler that an evaluation needs did not do its part."""


class ModelError(FedmpiError):
    """A backbone, tokenizer or adapter cannot be used."""


class WorldError(FedmpiError):
    """The launcher, the ranks or the placement do not fit together."""


class TrainingError(FedmpiError):
    """Local training of a client could not be done."""


class NonFinite(TrainingError):
    """A loss or an update that is not finite."""


class Stuck(TrainingError):
    """A client's training made no step within the deadline."""


class LinkError(FedmpiError):
    """Bytes could not be carried between two ranks."""


class PeerLost(LinkError):
    """The other side of a link is gone."""


class PeerSilent(LinkError):
    """The other side gave no byte and no heartbeat within the deadline."""


class ProtocolError(LinkError):
    """What came over a link is not what was agreed."""


class Aborted(LinkError):
    """Another rank failed and ended the job; the message is `ended` of that rank's error."""

    @property
    def kind(self) -> str:
        """The name of that error's class."""
        return str(self).partition(_ENDED)[2].partition(":")[0]


def ended(rank: int, error: BaseException) -> str:
    """What a rank tells the others of the error with which it ends the job."""
    return f"rank {rank}{_ENDED}{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}"


class CheckpointError(FedmpiError):
    """A run folder or a checkpoint that cannot be used as it is."""


class QuorumLost(FedmpiError):
    """Too few clients are left to count a round."""


class Stopped(FedmpiError):
    """Told to stop while there was no round to finish."""
