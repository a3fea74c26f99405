"""Names that tables and charts give the measured rows, layers and parts, and their units."""

MIB, GIB = 2**20, 2**30


def precision_text(amp: str) -> str:
    """A key of `AMP_DTYPE` in words."""
    return "float32" if amp == "none" else amp


# Rows of each model: name to (words, value of --encoder_attention).
ROWS = {
    "eager": ("plain, eager", "mhsa"),
    "efficient": ("plain, efficient", "mhsa"),
    "enact": ("ENACT", "enact"),
}


# Most clusters of the layer `enact_limited`, whose clusters grow with the map.
LIMIT = 256

# Names on the command line, and in tables.
LAYERS = {
    "mha_eager": "nn.MultiheadAttention, eager",
    "mha": "nn.MultiheadAttention",
    "enact": "EnactSelfAttention",
    "enact_regions": "EnactSelfAttention, regions",
    "enact_limited": f"EnactSelfAttention, at most {LIMIT} clusters",
    "rcda": "MultiheadRCDA",
    "clustered_rcda": "ClusteredRCDA",
}


# In the order in which a step passes through them.
PARTS = ("backbone", "encoder attention", "encoder, the rest", "decoder", "losses", "optimizer")
