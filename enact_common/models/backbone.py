"""ResNet backbones from torchvision, with frozen or trained batch norm, and their pretrained weights."""

from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.ops import FrozenBatchNorm2d

from enact_common.models.position_encoding import build_position_encoding
from enact_common.models.scripting import EXAMPLE_SIZE, traced, with_parts
from enact_common.nested_tensor import NestedTensor
from enact_common.utils.acceleration import Recomputed
from enact_common.utils.download import download
from enact_common.utils.errors import UserError
from enact_common.utils.files import read_tensors

# Blocks per stage.
STAGES = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}
BACKBONES = tuple(STAGES)
# torchvision's names.
ALL_STAGES = ("layer1", "layer2", "layer3", "layer4")
# Basic blocks instead of bottlenecks: 512 channels instead of 2048, and no dilated form.
SHALLOW_BACKBONES = ("resnet18", "resnet34")

WEIGHTS_WAYS_OUT = (
    "pass --backbone_weights PATH with the state dict of a torchvision ResNet, or train from scratch with "
    "--backbone_weights none --backbone_norm batch"
)


def versions(*tensors: Tensor) -> list[tuple[int, int]]:
    """Return each tensor's id and the number of its in-place changes."""
    # PyTorch does not count changes to inference-mode tensors.
    return [(id(tensor), 0 if tensor.is_inference() else tensor._version) for tensor in tensors]


class FrozenNorm(FrozenBatchNorm2d):
    """Frozen batch norm that stores each channel's scale and offset instead of computing them in every pass.

    Attributes:
        scale, offset: (channels,), `norm(x) = x * scale + offset`; buffers outside the state dict.
        keeps_folded: reuse the convolution's folded weight between passes without gradients.
    """

    keeps_folded = False

    def __init__(self, num_features: int, eps: float = 1e-5):
        super().__init__(num_features, eps)
        self.register_buffer("scale", None, persistent=False)
        self.register_buffer("offset", None, persistent=False)
        self.refresh()

    def refresh(self) -> None:
        """Compute `scale` and `offset` from the statistics and parameters."""
        # Make normal tensors even if the first call is in inference mode: the model may train afterwards.
        with torch.inference_mode(False), torch.no_grad():
            self.scale = self.weight * (self.running_var + self.eps).rsqrt()
            self.offset = self.bias - self.running_mean * self.scale
        self.versions = versions(self.weight, self.bias, self.running_mean, self.running_var)
        self.folded = None, None

    def fold_into(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return a convolution's weight (channels, ...) with the norm folded in, and its bias (channels,)."""
        compiling = torch.compiler.is_compiling()
        if not compiling and self.versions != versions(self.weight, self.bias, self.running_mean, self.running_var):
            self.refresh()  # a tensor was changed in place
        if compiling or not self.keeps_folded or torch.is_grad_enabled():
            return weight * self.scale.view(-1, 1, 1, 1), self.offset
        if self.folded[0] != versions(weight):
            self.folded = versions(weight), weight * self.scale.view(-1, 1, 1, 1)
        return self.folded[1], self.offset

    def __getstate__(self) -> dict:
        return {**self.__dict__, "folded": (None, None)}

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.refresh()

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.refresh()
        return self


NORMS = {"frozen": FrozenNorm, "batch": nn.BatchNorm2d}


def convolve_and_norm(x: Tensor, conv: nn.Conv2d, norm: nn.Module) -> Tensor:
    """Apply a convolution and its norm; fold frozen batch norm into the convolution's weights.

    A frozen norm is a scale and an offset for each channel. Folded into the convolution, they need no pass over the
    feature map, forward or backward. Mixed precision also stays in the lower precision, which the norm's float32
    buffers would leave.
    """
    if not isinstance(norm, FrozenNorm):
        return norm(conv(x))
    weight, offset = norm.fold_into(conv.weight)
    return F.conv2d(x, weight, offset, conv.stride, conv.padding, conv.dilation, conv.groups)


def keep_folded(model: nn.Module) -> None:
    """Fold frozen batch norms into their convolutions only once, for a model whose weights do not change."""
    for module in model.modules():
        if isinstance(module, FrozenNorm):
            module.keeps_folded = True


class ResidualBlock(Recomputed):
    """Base class of the ResNet blocks, which run each convolution together with its norm."""

    def add_shortcut(self, out: Tensor, x: Tensor) -> Tensor:
        """End the block: add its input, or the projection of the input, and apply ReLU."""
        out += x if self.downsample is None else convolve_and_norm(x, *self.downsample)
        return F.relu_(out)


class FoldedBasicBlock(ResidualBlock, BasicBlock):
    """The block of ResNet-18 and 34, with frozen norms folded."""

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu_(convolve_and_norm(x, self.conv1, self.bn1))
        return self.add_shortcut(convolve_and_norm(out, self.conv2, self.bn2), x)


class FoldedBottleneck(ResidualBlock, Bottleneck):
    """The block of ResNet-50 and 101, with frozen norms folded."""

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu_(convolve_and_norm(x, self.conv1, self.bn1))
        out = F.relu_(convolve_and_norm(out, self.conv2, self.bn2))
        return self.add_shortcut(convolve_and_norm(out, self.conv3, self.bn3), x)


class ResNetBody(IntermediateLayerGetter):
    """A ResNet up to the last stage in `return_layers`, with frozen norms folded; returns the maps of these stages."""

    COMPILED = ("forward",)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self["maxpool"](F.relu_(convolve_and_norm(x, self["conv1"], self["bn1"])))
        maps = {}
        for name, stage in self.items():
            if name.startswith("layer"):
                x = stage(x)
                if name in self.return_layers:
                    maps[self.return_layers[name]] = x
        return maps


class BackboneBase(nn.Module):
    """A ResNet without its head.

    Args:
        backbone: a torchvision ResNet.
        train_backbone, return_interm_layers, stages: as in `Backbone`.
        num_channels: channels of the last feature map.
        train_stem: with train_backbone, also train the stem and the first stage, which are frozen otherwise.
    """

    def __init__(
        self,
        backbone: nn.Module,
        train_backbone: bool,
        num_channels: int,
        return_interm_layers: bool,
        train_stem: bool = False,
        stages: int = len(ALL_STAGES),
    ):
        super().__init__()
        for name, parameter in backbone.named_parameters():
            deep = name.startswith(("layer2", "layer3", "layer4"))
            parameter.requires_grad_(train_backbone and (deep or train_stem))
        used = ALL_STAGES[:stages]
        self.body = ResNetBody(
            backbone, {name: str(i) for i, name in enumerate(used if return_interm_layers else used[-1:])}
        )
        self.num_channels = num_channels

    def forward(self, images: NestedTensor) -> dict[str, NestedTensor]:
        """Map images (batch, 3, H, W) to feature maps (batch, channels, h, w) by name, with masks of the same size.

        Strides of the stages are 4, 8, 16 and 32 pixels (16 for the last with dilation). `stride_of` gives the stride
        of the last stage in use.
        """
        maps = self.body(images.tensors)
        return {name: NestedTensor(map_, resize_mask(images.mask, map_)) for name, map_ in maps.items()}

    def __prepare_scriptable__(self) -> nn.Module:
        """Called by `torch.jit.script`: return a backbone whose ResNet is a traced graph, which holds folded norms."""
        example = torch.zeros(2, 3, *EXAMPLE_SIZE, device=next(self.parameters()).device)
        return with_parts(self, body=traced(self.body, example))


def resize_mask(mask: Tensor, features: Tensor) -> Tensor:
    """Sample a padding mask (batch, H, W) at the cells of features (batch, channels, h, w): bool (batch, h, w)."""
    return F.interpolate(mask.unsqueeze(1).float(), size=features.shape[-2:]).squeeze(1).to(torch.bool)


class Backbone(BackboneBase):
    """A torchvision ResNet as a backbone.

    Args:
        name: one of `BACKBONES`.
        train_backbone: train from the second stage on; otherwise everything is frozen.
        return_interm_layers: return the maps of all stages.
        dilation: dilate the last stage, for stride 16 instead of 32 (DC5). ResNet-50 and 101 only.
        weights: "default" for torchvision's ImageNet weights, "none" for random ones, or the path of a state dict.
        norm: "frozen" keeps the loaded statistics and affine parameters; "batch" trains batch norm, and with it the
            stem and the first stage.
        stages: how many stages to use, 1 to 4.

    Raises:
        UserError: the weights cannot be loaded, or the ResNet cannot be dilated.
    """

    def __init__(
        self,
        name: str,
        train_backbone: bool = True,
        return_interm_layers: bool = False,
        dilation: bool = False,
        weights: str = "default",
        norm: str = "frozen",
        stages: int = len(ALL_STAGES),
    ):
        shallow = name in SHALLOW_BACKBONES
        if dilation and shallow:
            raise UserError(f"--dilation needs --backbone resnet50 or resnet101: {name} has no dilated form")
        resnet = ResNet(
            FoldedBasicBlock if shallow else FoldedBottleneck,
            list(STAGES[name]),
            norm_layer=NORMS[norm],
            replace_stride_with_dilation=[False, False, dilation],
        )
        state = load_backbone_weights(name, weights)
        if state is not None:
            missing, _ = resnet.load_state_dict(state, strict=False)
            missing = [key for key in missing if not key.startswith("fc.") and "num_batches" not in key]
            if missing:
                raise UserError(
                    f"--backbone_weights {weights}: not a {name} state dict, {len(missing)} tensors are missing, "
                    f"{missing[0]} first"
                )
        # Channels double at each stage.
        channels = (64 if shallow else 256) << (stages - 1)
        super().__init__(resnet, train_backbone, channels, return_interm_layers, norm == "batch", stages)


def load_backbone_weights(name: str, weights: str) -> dict[str, Tensor] | None:
    """Load the state dict for `--backbone_weights`; None for "none".

    "default" downloads torchvision's IMAGENET1K_V1 weights, from which the published detectors were trained. The file
    is checked by its hash and kept in torchvision's cache.

    Raises:
        UserError: the download fails, or the file is missing or is not a state dict.
    """
    if weights == "none":
        return None
    if weights == "default":
        try:
            path = download(torchvision.models.get_model_weights(name).IMAGENET1K_V1.url)
        except UserError as error:
            raise UserError(f"--backbone_weights default: {error}. Ways out: {WEIGHTS_WAYS_OUT}") from error
    else:
        path = Path(weights)
    if not path.is_file():
        raise UserError(f"--backbone_weights {weights}: no such file. Ways out: {WEIGHTS_WAYS_OUT}")
    state = read_tensors(path, f"a state dict of a torchvision {name}, for --backbone_weights")
    for key in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise UserError(f"--backbone_weights {weights}: expected a state dict of a torchvision {name}")
    return state


class Joiner(nn.Sequential):
    """A backbone and the position encoding of its deepest feature map, which the transformer gets."""

    def __init__(self, backbone: BackboneBase, position_embedding: nn.Module):
        super().__init__(backbone, position_embedding)
        self.num_channels = backbone.num_channels

    def forward(self, images: NestedTensor) -> tuple[list[NestedTensor], list[Tensor]]:
        """Return the feature maps, deepest last, and a list with the last one's position encoding (batch, d, h, w)."""
        features = list(self[0](images).values())
        return features, [self[1](features[-1])]

    def __prepare_scriptable__(self) -> nn.Module:
        """Called by `torch.jit.script`: return a copy, because scripting replaces submodules in place."""
        return with_parts(self)


def stride_of(args) -> int:
    """Return the stride of the feature map that the transformer gets, pixels per cell."""
    return 16 if args.dilation else 2 ** (args.backbone_stages + 1)


def build_resnet(args, return_interm_layers: bool = False) -> Backbone:
    """Build the backbone from the arguments, without position encoding.

    With `--resume`, `--pretrained`, `--frozen_weights` or `--eval`, the checkpoint has the backbone's weights, so
    nothing is downloaded.
    """
    from_checkpoint = args.resume or args.pretrained or args.frozen_weights or args.eval
    return Backbone(
        args.backbone,
        train_backbone=args.lr_backbone > 0,
        return_interm_layers=return_interm_layers,
        dilation=args.dilation,
        weights="none" if from_checkpoint else args.backbone_weights,
        norm=args.backbone_norm,
        stages=args.backbone_stages,
    )


def build_backbone(args) -> Joiner:
    """Build backbone and position encoding from the arguments; `--masks` needs the maps of all stages."""
    return Joiner(build_resnet(args, return_interm_layers=args.masks), build_position_encoding(args))
