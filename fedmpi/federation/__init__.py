"""The federation: what an algorithm sees of the other ranks, and what the server decides for all of them.

arrivals    what the server receives in a round, whole or in pieces
coding      messages under a codec chain, and what a chain has to remember
lockstep    Federation: rounds, broadcast, gather; the same calls in the same order on every rank
conductor   the server's decisions: cohort, verdict, stop
joint       broadcasts and sums by collectives of all ranks
meeting     greeting, welcome, farewell; where the ranks of one client sit down together
moved       a broadcast leaves out what its receiver had in the one before
outbox      an update leaves while the next client trains
owned       state that clients own, provisional until it counts
post        JSON and tensors as messages over a transport, each under an agreed manifest
turns       a client's turn: whatever goes wrong inside is that client's Failure
probe       how fast links and codecs are, before the rounds
sums        a rank adds up what its own clients made
updates     what travels up: Update, Failure
"""

from typing import TYPE_CHECKING

from fedmpi.lazy import door

if TYPE_CHECKING:
    from fedmpi.federation.conductor import Conductor as Conductor
    from fedmpi.federation.lockstep import Federation as Federation
    from fedmpi.federation.updates import Failure as Failure
    from fedmpi.federation.updates import Outcome as Outcome
    from fedmpi.federation.updates import Update as Update

__getattr__ = door(
    __name__,
    {
        "Conductor": "conductor",
        "Federation": "lockstep",
        "Failure": "updates",
        "Outcome": "updates",
        "Update": "updates",
    },
)
