"""Detectors that are saved to a folder with a model card, and shared on Hugging Face's hub."""

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import torch

from enact_common.checkpoints.bundled import bundled_file
from enact_common.checkpoints.contents import IMAGE_FLAGS, model_words
from enact_common.checkpoints.files import LIBRARY, flag_text, load_checkpoint
from enact_common.checkpoints.huggingface import CONFIG, PREPROCESSOR, SAFETENSORS, WEIGHT_FILES
from enact_common.checkpoints.published import Model
from enact_common.cli.flags import CLUSTERING_FLAGS, MODEL_FLAGS
from enact_common.inference.detector import LoadedDetector, detector_parts, find_inference_device
from enact_common.models.layers import has_effect
from enact_common.utils.download import is_url
from enact_common.utils.errors import UserError
from enact_common.utils.extras import needed
from enact_common.utils.files import make_folder, read_json, write_file
from enact_common.weights.card import about_run, card

CARD = "README.md"

# The name in a card's example, before the folder has a name on the hub.
THIS_FOLDER = "path/to/this/folder"

# A name on the hub: the owner and the model.
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# A name that ends like this is a file's, mistyped or moved, so it is not looked up on the hub.
FILE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth", ".safetensors")


class EnactDetector(LoadedDetector):
    """A `LoadedDetector` that can be saved, shared and loaded by name.

    Attributes:
        about: what is known of its training, from `about_run`; the model card is written from it.
    """

    about: dict[str, Any]

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        device: str | torch.device | None = None,
        threshold: float | None = None,
        amp: str | None = None,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | Path | None = None,
        **flags,
    ) -> "EnactDetector":
        """Load a detector.

        Args:
            name: a folder of `save_pretrained`, anything that `load_detector` takes, or a name on Hugging Face's hub,
                OWNER/MODEL, which is downloaded.
            device, threshold, amp, flags: as in `load_detector`.
            revision: branch, tag or commit on the hub; None for its main branch.
            token: access token of the hub; None for the stored one.
            cache_dir: folder of downloads; None for Hugging Face's.

        Raises:
            UserError: as in `load_detector`; or the model cannot be downloaded, or huggingface_hub is not installed.
        """
        device = find_inference_device(device, amp)
        source = str(name)
        if not (Path(source).exists() or is_url(source) or bundled_file(source)):
            source = fetch(source, revision, token, cache_dir)
        state = load_checkpoint(source)
        detector = cls(**detector_parts(state, source, device, threshold, amp, flags))
        detector.about = state.get("about") or about_run(state, Path(source))
        return detector

    def save_pretrained(self, folder: str | Path, license: str | None = None, name: str = THIS_FOLDER) -> None:
        """Write the weights (`model.safetensors`), the settings (`config.json`) and a model card (`README.md`).

        The card and the settings come from the checkpoint and the files in its run's folder; they hold no paths.

        Args:
            folder: created if it is missing. Files of an earlier call are replaced.
            license: the weights' licence for the card, such as "apache-2.0"; None if unknown.
            name: the name from which the card's example loads the detector.

        Raises:
            UserError: the folder holds another model or cannot be written, or safetensors is not installed.
        """
        save = needed("safetensors.torch", "save_pretrained", "safetensors").save
        folder = Path(folder)
        config = read_json(folder / CONFIG)
        if (folder / CONFIG).exists() and (config or {}).get("library_name") != LIBRARY:
            raise UserError(f"{folder}: holds another model ({CONFIG}); choose another folder")
        make_folder(folder, "save_pretrained")
        # Copies, because safetensors refuses tensors that share memory, such as Anchor DETR's heads.
        state = self.model.state_dict()
        weights = {name: tensor.cpu().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
        settings = json.dumps(self.settings(), indent=2, ensure_ascii=False)
        for file, content in (
            (SAFETENSORS, save(weights, {"format": "pt"})),
            (CARD, self.card(license, name).encode()),
            (CONFIG, settings.encode()),
        ):
            write_file(folder / file, lambda opened, content=content: opened.write(content))

    def save_file(self, path: str | Path) -> None:
        """Write one small checkpoint that every command takes, and that no extra is needed to load.

        Matrices are stored in float16, which halves the file; vectors, among them the statistics of norms, stay in
        float32. Loading restores float32.

        Raises:
            UserError: the file cannot be written.
        """
        state = self.model.state_dict()
        weights = {name: tensor.cpu().half() if tensor.ndim > 1 else tensor.cpu() for name, tensor in state.items()}
        about = {key: value for key, value in self.settings().items() if key != "library_name"}
        write_file(Path(path), lambda file: torch.save({"model": weights, **about}, file))

    def push_to_hub(
        self, name: str, license: str | None = None, private: bool = False, token: str | None = None
    ) -> str:
        """Upload what `save_pretrained` writes to Hugging Face's hub.

        Args:
            name: OWNER/MODEL; created if it is missing.
            license: the weights' licence for the card, such as "apache-2.0"; None if unknown.
            private: create it for yourself alone.
            token: access token with the right to write; None for the stored one.

        Returns:
            the model's address.

        Raises:
            UserError: huggingface_hub or safetensors is not installed, or the hub refuses the upload.
        """
        hub = needed("huggingface_hub", "push_to_hub", "huggingface").HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, license, name)
            try:
                address = hub.create_repo(name, private=private, exist_ok=True)
                hub.upload_folder(repo_id=name, folder_path=folder)
            except Exception as error:  # of the hub or of its HTTP library, which changes between releases
                raise UserError(
                    f"{name}: cannot be uploaded to Hugging Face's hub ({reason_of(error)}); check the name, the "
                    "network and that the token may write"
                ) from error
        return str(address)

    def settings(self) -> dict[str, Any]:
        """Return the content of `config.json`: everything about the detector except its weights, in JSON types."""
        flags = (*MODEL_FLAGS, *CLUSTERING_FLAGS, *IMAGE_FLAGS, "dataset_file")
        return {
            "library_name": LIBRARY,
            "variant": self.variant,
            "args": {flag: getattr(self.args, flag) for flag in flags if getattr(self.args, flag, None) is not None},
            "label_map": self.label_map.to_dict(),
            "epoch": self.about["epoch"],
            "about": self.about,
        }

    def card(self, license: str | None = None, name: str = THIS_FOLDER) -> str:
        """Return the model card; arguments are those of `save_pretrained`."""
        args, model = self.args, Model.of(self.args, self.variant)
        core = getattr(self.model, "detr", self.model)
        words = model_words(args, self.variant)
        for flag in CLUSTERING_FLAGS:
            value = getattr(args, flag, None)
            # Kernels belong to a machine.
            if value and flag != "enact_kernels" and has_effect(flag, args.encoder_attention):
                words.append(flag_text(flag, value))
        return card(
            model.title, self.variant, self.label_map, self.about, " ".join(words), core.num_queries, args.eval_size,
            license, name,
        )  # fmt: skip


def fetch(name: str, revision: str | None, token: str | None, cache_dir: str | Path | None) -> str:
    """Download a model from Hugging Face's hub; return its folder in the cache."""
    if not HUB_NAME.fullmatch(name) or name.startswith(".") or name.endswith(FILE_SUFFIXES):
        raise UserError(f"{name}: no such file or folder; pass one, or a name on Hugging Face's hub, OWNER/MODEL")
    hub = needed("huggingface_hub", f"{name}: no such file or folder here; fetching it from the hub", "huggingface")
    options = {"revision": revision, "token": token, "cache_dir": cache_dir}
    try:
        folder = hub.snapshot_download(name, allow_patterns=[CONFIG, PREPROCESSOR, SAFETENSORS], **options)
        if not any((Path(folder) / file).is_file() for file in WEIGHT_FILES):
            hub.snapshot_download(name, allow_patterns=list(WEIGHT_FILES), **options)
    except (OSError, ValueError) as error:  # the hub's errors are kinds of these
        raise UserError(
            f"{name}: no such folder here, and it cannot be fetched from Hugging Face's hub ({reason_of(error)}); "
            "check the name, the network and the token"
        ) from error
    return folder


def reason_of(error: Exception) -> str:
    """Return the first line of an error of the hub, at most 200 characters."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
