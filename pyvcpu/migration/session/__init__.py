"""Migration sessions: a guest moves from one machine to another."""

from pyvcpu.migration.session.destination import DestinationSession
from pyvcpu.migration.session.policy import MigrationParameters
from pyvcpu.migration.session.source import HandOverUnconfirmed, MigrationCancelled, SourceSession
from pyvcpu.migration.session.states import FINAL, TRANSITIONS, StateMachine, Status
from pyvcpu.migration.session.statistics import DOWNTIME_PARTS, Iteration, Statistics
from pyvcpu.migration.session.step import Step

__all__ = [
    "DOWNTIME_PARTS", "FINAL", "TRANSITIONS", "DestinationSession", "HandOverUnconfirmed", "Iteration",
    "MigrationCancelled", "MigrationParameters", "SourceSession", "StateMachine", "Statistics", "Status", "Step",
]  # fmt: skip
