"""The benchmarked trunks in torch.nn, by the names of torchvision's files, and timm's own."""

import torch
from torch import Tensor, nn


class Bottleneck(nn.Module):
    def __init__(self, before: int, width: int, stride: int, project: bool):
        super().__init__()
        after = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(before, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, after, 1, bias=False), nn.BatchNorm2d(after)
        shortcut = nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after)
        self.downsample = nn.Sequential(*shortcut) if project else None

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu_(self.bn1(self.conv1(x)))
        y = torch.relu_(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return torch.relu_(y + (self.downsample(x) if self.downsample is not None else x))


class ResNet50(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        self.pool = nn.MaxPool2d(3, 2, 1)
        before = 64
        for i, depth in enumerate((3, 4, 6, 3)):
            width, stride = 64 * 2**i, 1 if i == 0 else 2
            blocks = []
            for j in range(depth):
                blocks.append(Bottleneck(before, width, stride if j == 0 else 1, j == 0))
                before = 4 * width
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(torch.relu_(self.bn1(self.conv1(x))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


class VGG16(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for width, depth in zip((64, 128, 256, 512, 512), (2, 2, 3, 3, 3), strict=True):
            for _ in range(depth):
                layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU(inplace=True)]
                before = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x)


def conv_norm(before: int, after: int, size: int, stride: int = 1, groups: int = 1, act=nn.SiLU):
    conv = nn.Conv2d(before, after, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(after), *([act(inplace=True)] if act else []))


class Squeeze(nn.Module):
    def __init__(self, wide: int, narrow: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(wide, narrow, 1), nn.Conv2d(narrow, wide, 1)

    def forward(self, x: Tensor) -> Tensor:
        s = nn.functional.silu(self.fc1(x.mean((2, 3), keepdim=True)))
        return x * torch.sigmoid(self.fc2(s))


class MBConv(nn.Module):
    def __init__(self, before: int, after: int, size: int, stride: int, expand: int):
        super().__init__()
        wide = before * expand
        layers: list[nn.Module] = [conv_norm(before, wide, 1)] if expand > 1 else []
        layers += [
            conv_norm(wide, wide, size, stride, groups=wide),
            Squeeze(wide, before // 4),
            conv_norm(wide, after, 1, act=None),
        ]
        self.block = nn.Sequential(*layers)
        self.skip = stride == 1 and before == after

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) + x if self.skip else self.block(x)


class EfficientNetB0(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        plan = (
            *((3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3)),
            *((5, 1, 6, 112, 3), (5, 2, 6, 192, 4), (3, 1, 6, 320, 1)),
        )
        layers: list[nn.Module] = [conv_norm(3, 32, 3, 2)]
        before = 32
        for size, stride, expand, after, depth in plan:
            blocks = []
            for i in range(depth):
                blocks.append(MBConv(before, after, size, stride if i == 0 else 1, expand))
                before = after
            layers.append(nn.Sequential(*blocks))
        self.features = nn.Sequential(*layers, conv_norm(320, 1280, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x)


class Timm(nn.Module):
    """A model of timm's, eager, as a map of one place: what classifiers see."""

    def __init__(self, name: str) -> None:
        super().__init__()
        import timm

        sizes = {"dynamic_img_size": True} if name.startswith("vit") else {}
        self.model = timm.create_model(name, num_classes=0, **sizes)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)[:, :, None, None]


def build(trunk: str) -> nn.Module:
    known = {"resnet50": ResNet50, "vgg16": VGG16, "efficientnet_b0": EfficientNetB0}
    return known[trunk]() if trunk in known else Timm(trunk)
