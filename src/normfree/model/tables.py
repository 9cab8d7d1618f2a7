"""TABLES: fields of NormFreeConfig that name one entry of a table; `activation` names several."""

from .attention_parts import GATES, SINKS, TEMPERATURES
from .blocks import BRANCHES, PLACEMENTS
from .linears import LINEARS
from .norms import NORMS, QUERY_KEY_NORMS

TABLES = {
    "norm": NORMS,
    "final_norm": NORMS,
    "placement": PLACEMENTS,
    "query_key_norm": QUERY_KEY_NORMS,
    "branch": BRANCHES,
    "linear": LINEARS,
    "attention_temperature": TEMPERATURES,
    "attention_sink": SINKS,
    "attention_gate": GATES,
}
