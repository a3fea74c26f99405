"""Names of the measured rows, layers and parts in tables and charts, and units."""

MIB, GIB = 2**20, 2**30


def precision_text(amp: str) -> str:
    """Return the name of a precision, a key of `AMP_DTYPE`, for tables."""
    return "float32" if amp == "none" else amp


# Rows of each model: name to (label, value of --encoder_attention).
ROWS = {
    "eager": ("plain, eager", "mhsa"),
    "efficient": ("plain, efficient", "mhsa"),
    "enact": ("ENACT", "enact"),
}


# Maximum number of clusters in the layer `enact_limited`; on larger maps its clusters grow.
LIMIT = 256

# Layers: name on the command line to label in tables.
LAYERS = {
    "mha_eager": "nn.MultiheadAttention, eager",
    "mha": "nn.MultiheadAttention",
    "enact": "EnactSelfAttention",
    "enact_regions": "EnactSelfAttention, regions",
    "enact_limited": f"EnactSelfAttention, at most {LIMIT} clusters",
    "rcda": "MultiheadRCDA",
    "clustered_rcda": "ClusteredRCDA",
}


# Parts of a training step, in order of execution.
PARTS = ("backbone", "encoder attention", "encoder, the rest", "decoder", "losses", "optimizer")
