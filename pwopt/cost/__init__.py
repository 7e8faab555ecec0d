"""The cost floor: what nodes and models cost, counted from shapes and estimated in seconds."""

from pwopt.cost.analytic import ModelCost, NodeCost, Operand, model_cost, node_cost
from pwopt.cost.estimate import Machine, estimate_seconds, rewrite_seconds, window_seconds
from pwopt.cost.operators import WorkClass

__all__ = [
    "Machine",
    "ModelCost",
    "NodeCost",
    "Operand",
    "WorkClass",
    "estimate_seconds",
    "model_cost",
    "node_cost",
    "rewrite_seconds",
    "window_seconds",
]
