"""The contrastive part of a training step of Alonso et al. (ICCV 2021), at the feature maps of the paper's settings.

Remembers the teacher's sure pixels, projects and predicts those of the student, weighs and contrasts them, and goes
back down to the feature maps. The network is timed beside it, for the share of the step that the contrast costs.
"""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, cross_entropy, interpolate, linear, normalize, relu

from pixcontrast import ContrastBranch, MLPHead
from pixcontrast.reference import as_rows
from pixcontrast.select import labels_at

from .positive import class_pairs
from .problem import (
    Contender,
    Results,
    SettledProblem,
    Step,
    Work,
    capturable,
    deviation,
    differentiate,
    forward_and_backward,
    normal,
    random_labels,
)
from .selectors import class_selectors, use_backend

IGNORE = 255
ROUNDED_TOLERANCE = 5e-2  # with products of bfloat16 or tf32
TOLERANCE = 5e-3  # a few pixels of 100,000 with another gradient: 2.5e-3 for the formula in float32


@dataclass(frozen=True)
class Setting:
    """Sizes of one of the paper's settings."""

    network: str
    labelled: int  # images of a step, B
    unlabelled: int  # images of a step, U, each in two views
    crop: int
    channels: int
    size: int  # of the feature map
    classes: int = 19
    quota: int = 3  # rows of an image and class that may be remembered


SETTINGS = {
    "city-v2": Setting("deeplab_v2", 5, 2, 512, 2048, 64),
    "city-v2-coco": Setting("deeplab_v2_coco", 5, 2, 512, 2048, 65),
    "city-v3plus": Setting("deeplab_v3plus", 7, 3, 512, 256, 128),
    "voc-v2": Setting("deeplab_v2", 14, 7, 321, 2048, 41, 21, 7),
    "voc-v3plus": Setting("deeplab_v3plus", 20, 10, 321, 256, 81, 21, 7),
}


@dataclass
class Branch(SettledProblem):
    """Maps of student and teacher, labels of both batches, and a full memory that each step begins with."""

    setting: Setting
    labelled: Tensor  # [B, D, h, w], the student's
    unlabelled: Tensor  # [2U, D, h, w], the student's
    teacher_maps: Tensor  # [B, D, h, w]
    teacher_logits: Tensor  # [B, C, h, w]
    labels: Tensor  # [B, H, W]
    pseudo: Tensor  # [2U, H, W]
    student: ContrastBranch
    teacher: ContrastBranch
    autocast: bool = False  # products in bfloat16 where PyTorch's autocast does so
    rows: Tensor = field(init=False)  # [C, N, D'], the memory at the beginning

    def __post_init__(self) -> None:
        self.dtype = torch.bfloat16 if self.autocast else torch.float32
        self.rows = self.student.memory.rows.clone()
        self.leaves = {"labelled": self.labelled.requires_grad_(), "unlabelled": self.unlabelled.requires_grad_()}
        self.leaves |= dict(self.student.named_parameters())

    @staticmethod
    def random(
        setting: Setting, capacity: int = 256, dim: int = 256, autocast: bool = False, device: str = "cpu"
    ) -> Branch:
        """Labels in 16 blocks an image, a tenth of them ignored; the teacher is right and sure where they are not."""
        s = setting
        labels = _blocks(random_labels(device, s.classes, s.labelled, 4, 4), s.crop)
        pseudo = _blocks(random_labels(device, s.classes, 2 * s.unlabelled, 4, 4, seed=1), s.crop)
        cells = labels_at(labels, (s.size, s.size))
        for one in (labels, pseudo):
            one[:, : s.crop // 10] = IGNORE
        logits = 12 * nn.functional.one_hot(cells, s.classes).permute(0, 3, 1, 2).float()
        map_size = (s.channels, s.size, s.size)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            student, teacher = (
                ContrastBranch(s.channels, s.classes, dim=dim, capacity=capacity, variant="released", quota=s.quota).to(
                    device
                )
                for _ in range(2)
            )
        student.memory.rows.copy_(normalize(normal(device, s.classes, capacity, dim), dim=-1))
        student.memory.counts.fill_(capacity)
        return Branch(
            s, normal(device, s.labelled, *map_size), normal(device, 2 * s.unlabelled, *map_size, seed=1),
            normal(device, s.labelled, *map_size, seed=2), logits, labels, pseudo, student, teacher,
            autocast,
        )  # fmt: skip

    def work(self) -> Work:
        pixels = self.setting.size**2
        student = (self.setting.labelled + 2 * self.setting.unlabelled) * pixels
        teacher = self.setting.labelled * pixels
        width = self.rows.shape[2]
        head, later = self.setting.channels * width, 3 * width * width  # the projection's first product; the others
        # forward, gradients of rows and of weights; the selectors' rows want none; the teacher only projects
        products = student * (3 * (head + later) + 2 * width * width) + teacher * (head + 2 * width * width)
        return Work(bytes=4 * (3 * student + teacher) * self.setting.channels, flops=2 * products, dtype=self.dtype)

    def truth(self) -> Results:
        student, teacher = (copy.deepcopy(branch).double() for branch in (self.student, self.teacher))
        student.memory.rows.copy_(self.rows)
        names = ("labelled", "unlabelled", "teacher_maps", "teacher_logits")
        double = {name: getattr(self, name).detach().double() for name in names}
        results = differentiate(as_it_stands, replace(self, **double, student=student, teacher=teacher, autocast=False))
        # the heads' other gradients are sums of these or, for biases before a norm, rounding noise
        held = ("loss", "labelled", "unlabelled", "project.first.weight", "predict.last.weight")
        return {name: results[name] for name in held}

    def error(self, results: Results) -> float:
        """Relative deviation from float64 in the Euclidean norm.

        Where rounding takes a hidden number to the other side of zero, ReLU passes another gradient to that pixel, and
        rightly so. That happens to some pixels in a hundred thousand, which weigh little in this norm, but would be all
        that the largest deviation is about.
        """
        return deviation(results, self._truth, torch.linalg.vector_norm)

    def accepts(self, error: float) -> bool:
        return error <= (TOLERANCE if self.dtype == torch.float32 and not self.tf32 else ROUNDED_TOLERANCE)

    def surroundings(self) -> list[tuple[Step, float]]:
        """The network, if the setting names one: student and teacher on two images each."""
        if not self.setting.network:
            return []
        from train.networks import MEANS, build_network

        s = self.setting
        device = str(self.labels.device)
        network = build_network(s.network, s.classes, MEANS["cityscapes"]).to(device)
        images, labels = normal(device, 2, 3, s.crop, s.crop), self.labels[:2]

        def learn() -> Results:
            logits = interpolate(network(images)[0], (s.crop, s.crop), mode="bilinear", align_corners=True)
            loss = cross_entropy(logits, labels, ignore_index=IGNORE)
            network.zero_grad()
            loss.backward()
            return {"loss": loss}

        def look() -> Results:
            with torch.no_grad():
                return {"logits": network(images)[0]}

        return [(learn, (s.labelled + 2 * s.unlabelled) / 2), (look, (s.labelled + s.unlabelled) / 2)]


def _blocks(blocks: Tensor, size: int) -> Tensor:
    """``[B, h, w]`` labels enlarged to ``[B, size, size]``."""
    return interpolate(blocks[:, None].float(), (size, size), mode="nearest")[:, 0].long()


def as_it_stands(problem: Branch) -> Tensor:
    """As the paper's code goes about it: masked copies, class by class, all pairs of rows and memory."""
    memory = _remember(problem)
    student = problem.student
    return _contrast(student, problem.labelled, problem.labels, memory) + _contrast(
        student, problem.unlabelled, problem.pseudo, memory
    )


@torch.no_grad()
def _remember(problem: Branch) -> list[Tensor]:
    """The memory of each class, newest rows first, with the sure and right pixels of this step in it."""
    teacher, labels, capacity = problem.teacher, problem.labels, problem.rows.shape[1]
    logits = interpolate(problem.teacher_logits, labels.shape[1:], mode="bilinear", align_corners=True)
    size = (problem.setting.size, problem.setting.size)
    probability, predicted = (labels_at(part, size).reshape(-1) for part in torch.softmax(logits, dim=1).max(dim=1))
    flat = labels_at(labels, size).reshape(-1)
    sure = (predicted == flat) & (probability > teacher.threshold)
    rows, flat = _head(teacher.project, as_rows(problem.teacher_maps)[sure]), flat[sure]
    rank = class_selectors(teacher.select_features)
    quota = (problem.student.quota or capacity) * len(labels)
    memory = []
    for c, old in enumerate(problem.rows):
        new = rows[flat == c]
        if len(new) > quota:
            new = new[rank(new, c).argsort()[:quota]]  # the lowest, as in the released code
        memory.append(torch.cat([normalize(new, dim=1), old.flip(0)])[:capacity])
    return memory


def _contrast(branch: ContrastBranch, maps: Tensor, labels: Tensor, memory: list[Tensor]) -> Tensor:
    flat = labels_at(labels, (maps.shape[2], maps.shape[3])).reshape(-1)
    valid = flat != IGNORE
    rows, flat = _head(branch.predict, _head(branch.project, as_rows(maps)[valid])), flat[valid]
    weigh = class_selectors(branch.select_features)
    loss = rows.new_zeros(())
    for c, stored in enumerate(memory):
        members = rows[flat == c]
        if len(members) > 1:
            loss = loss + class_pairs(members, stored, weigh(members.detach(), c), None)
    return loss / len(memory)


def _head(head: MLPHead, rows: Tensor) -> Tensor:
    """Linear, BatchNorm, ReLU, Linear."""
    hidden = batch_norm(head.first(rows), None, None, head.norm.weight, head.norm.bias, training=True)
    return linear(relu(hidden), head.last.weight, head.last.bias)


def pixcontrast(backend: str) -> Contender:
    """:class:`pixcontrast.ContrastBranch` as a trainer calls it."""

    def loss(problem: Branch) -> Tensor:
        student, memory = problem.student, problem.student.memory
        use_backend(student, backend)
        use_backend(problem.teacher, backend)
        memory.cursors.zero_()  # each step writes the same rows into the same slots
        device = problem.labels.device.type
        with torch.autocast(device, torch.bfloat16) if problem.autocast else contextlib.nullcontext():
            student.remember(problem.teacher_maps, problem.teacher_logits, problem.labels, teacher=problem.teacher)
            return student(problem.labelled, problem.labels) + student(problem.unlabelled, problem.pseudo)

    return forward_and_backward(loss)


CONTENDERS: dict[str, Contender] = {
    "pixcontrast": capturable(pixcontrast("extension")),
    "pixcontrast reference": pixcontrast("reference"),
    "formula as it stands": forward_and_backward(as_it_stands),
}
