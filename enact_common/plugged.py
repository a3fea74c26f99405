"""Load a Hugging Face model whose attention `plug_in` replaced, from the files of `save_pretrained`."""

from pathlib import Path
from typing import Any

from torch import nn

from enact_common.attention.plug_in import plug_in_noted
from enact_common.utils.errors import UserError
from enact_common.utils.extras import needed

# The arguments of `from_pretrained` that say where files are.
OF_FILES = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")

# Parts of an attention in the model's dtype; what it learns beside them is in float32.
PROJECTIONS = {"W_q", "W_k", "W_v", "W_o"}


def load_plugged(model_class: type, folder_or_name: str | Path, **settings: Any) -> nn.Module:
    """Load a model that `plug_in` changed and `save_pretrained` or `transformers.Trainer` saved, bit for bit.

    Args:
        model_class: a class of `transformers`, such as `AutoModelForObjectDetection` or `YolosForObjectDetection`.
        folder_or_name: the folder, or a name on Hugging Face's hub.
        settings: other arguments of `from_pretrained`.

    Returns:
        the model in evaluation mode, with the attention that its `config.enact` names.

    Raises:
        UserError: transformers is missing, there is no such model, it has no settings of ENACT, it is of another class,
            or its weights are not those of its settings.
    """
    transformers = needed("transformers", "load_plugged", "huggingface")
    try:
        config = transformers.AutoConfig.from_pretrained(
            folder_or_name, **{name: settings[name] for name in OF_FILES if name in settings}
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder_or_name}: no model of transformers: pass a folder that save_pretrained wrote, with its "
            f"config.json, or a name on the hub; for this project's own checkpoints use load_detector ({error})"
        ) from error
    noted = getattr(config, "enact", None)
    if not noted or not isinstance(noted, dict):
        raise UserError(
            f"{folder_or_name}: its configuration has no settings of ENACT (`enact`), so its attention is a plain one: "
            "load it with from_pretrained, then call plug_in"
        )
    plain = class_of(model_class, config, folder_or_name)
    frozen: set[str] = set()  # biases that the plain attention lacks

    class Plugged(plain):
        """The plain class with its attention replaced before the weights are loaded."""

        def __init__(self, config, *args: Any, **kwargs: Any):
            super().__init__(config, *args, **kwargs)
            self.config.enact = {}  # noted again by the name that a module has in this class
            try:
                plug_in_noted(self, {name_in(self, name): values for name, values in noted.items()})
            except (TypeError, ValueError) as error:
                raise UserError(
                    f"{folder_or_name}: {plain.__name__} cannot be built with the settings of ENACT in its "
                    f"configuration: {error}"
                ) from error
            layers = {layer: self.get_submodule(layer) for layer in self.config.enact}
            own = [(layer, *item) for layer in layers for item in layers[layer].named_parameters()]
            frozen.update(f"{layer}.{name}" for layer, name, parameter in own if not parameter.requires_grad)
            learned = {name.partition(".")[0] for _, name, _ in own} - PROJECTIONS
            kept = getattr(self, "_keep_in_fp32_modules_strict", None) or ()
            self._keep_in_fp32_modules_strict = {*kept, *learned}

    # transformers renames the tensors of files by these, and does not for classes from elsewhere.
    Plugged.__name__, Plugged.__module__ = plain.__name__, plain.__module__
    try:
        model, info = Plugged.from_pretrained(folder_or_name, config=config, output_loading_info=True, **settings)
    except OSError as error:
        raise UserError(f"{folder_or_name}: its weights cannot be read: {error}") from error
    model.__class__ = plain  # a local class could not be pickled
    missing = [key for key in info["missing_keys"] if any(key.startswith(f"{name}.") for name in model.config.enact)]
    if missing:
        raise UserError(
            f"{folder_or_name}: its weights lack {min(missing)} and {len(missing) - 1} others that the settings of "
            "ENACT in its configuration ask for: the weights were saved before plug_in, or by another model"
        )
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)  # transformers 5 makes all loaded weights train
    restore_constants(model)
    return model


def class_of(model_class: type, config: Any, source: str | Path) -> type:
    """Return the class of models of a configuration that `model_class`, an `AutoModel...` or a model's own, stands for.

    Raises:
        UserError: the class has no such models.
    """
    mapping = getattr(model_class, "_model_mapping", None)
    if mapping is not None and type(config) in mapping:
        from transformers.models.auto.auto_factory import _get_model_class

        return _get_model_class(config, mapping)
    if mapping is None and type(config) is getattr(model_class, "config_class", None):
        return model_class
    name = getattr(model_class, "__name__", model_class)
    saved = ", ".join(getattr(config, "architectures", None) or ()) or "a model of this kind"
    raise UserError(
        f"{source}: {name} cannot load it, its configuration is a {type(config).__name__}: pass {saved}, or an "
        "AutoModel class that loads it"
    )


def name_in(model: nn.Module, name: str) -> str:
    """Return a module's name in a model, from its name in the same model with or without heads.

    Raises:
        ValueError: the model has no such module.
    """
    prefix = f"{model.base_model_prefix}."
    names = {part for part, _ in model.named_modules()}
    for candidate in (name, prefix + name, name.removeprefix(prefix)):
        if candidate in names:
            return candidate
    raise ValueError(
        f"it has no module {name}; plug_in was called with a part of the model instead of the whole, or the model was "
        "saved with another release of transformers"
    )


def restore_constants(model: nn.Module) -> None:
    """Make the buffers that files do not have anew: transformers builds models without data."""
    for name, settings in model.config.enact.items():
        layer = model.get_submodule(name)
        fresh = nn.Sequential(nn.MultiheadAttention(layer.embed_dim, layer.num_heads))
        plug_in_noted(fresh, {"0": settings})
        for buffer, value in fresh[0].named_buffers():
            setattr(layer, buffer, value.to(layer.W_q.weight.device, getattr(layer, buffer).dtype))
