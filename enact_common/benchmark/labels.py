"""Names of the measured rows, layers and parts in tables and charts, and units."""

from enact_common.attention.rivals import RIVALS

MIB, GIB = 2**20, 2**30


def precision_text(amp: str) -> str:
    """Return the name of a precision, a key of `AMP_DTYPE`, for tables."""
    return "float32" if amp == "none" else amp


def attention_text(attention: str) -> str:
    """Return the name of an encoder attention, a value of `--encoder_attention`, for tables."""
    return {"enact": "ENACT", "mhsa": "plain"}.get(attention, attention)


# Rows of each model: name to (label, value of --encoder_attention).
ROWS = {
    "eager": ("plain, eager", "mhsa"),
    "efficient": ("plain, efficient", "mhsa"),
    "enact": ("ENACT", "enact"),
}


# Most clusters in the layers `enact_limited` and `enact_equal`, whose clusters grow on larger maps; token budget of the
# rivals.
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
    "enact_equal": f"EnactSelfAttention, equal information, at most {LIMIT} clusters",
    **{
        name: f"{rival.__name__}, budget {LIMIT}" if rival.takes_budget else rival.__name__
        for name, rival in RIVALS.items()
    },
}

# Layers that Triton's kernels compute, only on GPUs.
TRITON_LAYERS = {f"{name}_triton": name for name in ("enact", "enact_limited", "enact_equal", "rcda", "clustered_rcda")}
LAYERS |= {name: f"{LAYERS[layer]}, Triton" for name, layer in TRITON_LAYERS.items()}

# Layers that pack their windows, as in training.
PACKED_LAYERS = {"enact_triton_packed": "enact_triton"}
LAYERS |= {name: f"{LAYERS[layer]}, packed" for name, layer in PACKED_LAYERS.items()}

# Layers that run as CUDA graphs, and all that need a GPU, with the name of the layer that does not.
GRAPHED_LAYERS = {f"{name}_graph": name for name in ("mha", "enact_equal", "enact_equal_triton")}
LAYERS |= {name: f"{LAYERS[layer]}, CUDA graph" for name, layer in GRAPHED_LAYERS.items()}
GPU_LAYERS = TRITON_LAYERS | {
    name: TRITON_LAYERS.get(layer, layer) for name, layer in (PACKED_LAYERS | GRAPHED_LAYERS).items()
}

# Parts of a training step, in order of execution.
PARTS = ("backbone", "encoder attention", "encoder, the rest", "decoder", "losses", "optimizer")
