"""A load generator for a running server, and the field's figures of what it saw. No torch."""

from masquerade_server.bench.figures import Distribution, Figures, Slo, figures_of
from masquerade_server.bench.load import Outcome, run_load
from masquerade_server.bench.timeline import Failure, Timeline
from masquerade_server.bench.workload import Call, Popularity, choose, departures, question

__all__ = [
    "Call",
    "Distribution",
    "Failure",
    "Figures",
    "Outcome",
    "Popularity",
    "Slo",
    "Timeline",
    "choose",
    "departures",
    "figures_of",
    "question",
    "run_load",
]
