"""TABLES: fields of NormFreeConfig that name one entry of a table; `activation` names several."""

from .branches import BRANCHES
from .gates import GATES
from .linears import LINEARS
from .norms import NORMS, QUERY_KEY_NORMS
from .placements import PLACEMENTS
from .sinks import SINKS
from .temperatures import TEMPERATURES

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
