"""The training loop that Alonso et al. released, run from a checkout of their code; nothing of it is stored here.

Their script is imported, its settings come from its own ``__main__`` block and one of its own configurations, and its
``main`` is called. Replaced are what needs data, a GPU or a download, the depth of the network, the range of the steps,
and every augmentation but ClassMix.
"""

from __future__ import annotations

import ast
import importlib
import io
import json
import random
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from train.data.batches import Batch
from train.errors import UserError, reason
from train.paper.rows import Row

REPOSITORY = "https://github.com/Shathe/SemiSeg-Contrastive"
UNUSED = ("kornia", "cv2", "scipy", "scipy.misc")
"""Libraries that the script imports to read and augment images, which is not done here."""
NETWORKS = {
    "deeplab_v2": "model.deeplabv2_imagenet",
    "deeplab_v2_coco": "model.deeplabv2",
    "deeplab_v3plus": "model.deeplabv3",
}


@dataclass
class Problem:
    """What both loops are given.

    Attributes:
        total: labelled and unlabelled images.
        size: height and width of the images.
        steps: numbers of the steps that are taken.
        streams: endless batches of uint8 RGB images and labels: ``labelled``, ``unlabelled``, ``source``.
    """

    classes: int
    labelled: int
    total: int
    memory_rows: int
    batch: int
    size: int
    steps: Sequence[int]
    streams: dict[str, Callable[[], Iterator[Batch]]]

    def coin(self, step: int, view: int) -> float:
        """The number that decides on ClassMix of a view (0: the labelled images), mostly a small one for view 0."""
        return random.Random(f"coin {step} {view}").random() ** (2 if view == 0 else 1)

    def ascending(self, step: int, view: int, image: int) -> bool:
        """Whether ClassMix picks the first or the last of the sorted classes of ``image``."""
        return random.Random(f"order {step} {view} {image}").random() < 0.5


@dataclass
class TheirStep:
    """The state after a step; the loop goes on to change it.

    Attributes:
        losses: terms by our names, each with the factor that it has in the sum.
        memory: of each class rows ``[N, D]``, the newest first, or None.
    """

    step: int
    lr: float
    losses: dict[str, float]
    student: nn.Module
    teacher: nn.Module
    memory: list[Any]


class TheirCode:
    """An imported checkout; outside of the context nothing of it stays importable.

    Args:
        folder: the checkout.
        row: chooses script, configuration and network.

    Raises:
        UserError: not such a checkout.
    """

    def __init__(self, folder: Path, row: Row) -> None:
        self.folder, self.row = folder.resolve(), row
        self.script = "trainSSL_domain_adaptation_targetCity" if row.adapts else "trainSSL"
        kind = "v3" if row.network == "deeplab_v3plus" else {"ImageNet": "imagenet"}.get(row.pretraining, "COCO")
        name = f"configSSL_{'pascal' if row.dataset == 'voc' else 'city'}_{row.ratio.replace('/', '_')}_split0_{kind}"
        for file in (f"{self.script}.py", f"configs/{name}.json"):
            if not (self.folder / file).is_file():
                raise UserError(f"--semiseg {folder} has no {file}: give a checkout of {REPOSITORY}")
        self.config = json.loads((self.folder / "configs" / f"{name}.json").read_text(encoding="utf-8"))

    def __enter__(self) -> TheirCode:
        self._own = {name: sys.modules.pop(name, None) for name in ("data", "model", "utils", *UNUSED)}
        sys.modules.update({name: mock.MagicMock() for name in UNUSED})
        sys.path.insert(0, str(self.folder))
        try:
            with warnings.catch_warnings(action="ignore"):
                self.main = importlib.import_module(self.script)
                self.network = importlib.import_module(NETWORKS[self.row.network])
                self.source = importlib.import_module("data.gta5_loader")
        except Exception as error:
            self.__exit__()
            raise UserError(
                f"--semiseg {self.folder}: {self.script}.py cannot be imported ({reason(error)}): give a checkout of "
                f"{REPOSITORY}"
            ) from error
        return self

    def __exit__(self, *_: object) -> None:
        sys.path.remove(str(self.folder))
        for name, module in list(sys.modules.items()):
            places = [vars(module).get("__file__") or "", *(vars(module).get("__path__") or ())]
            if name in UNUSED or any(place.startswith(str(self.folder)) for place in places):
                del sys.modules[name]
        sys.modules.update({name: module for name, module in self._own.items() if module is not None})

    def build(self, num_classes: int) -> nn.Module:
        """Their network with one block in each stage."""
        return self.network.ResNet(self.network.Bottleneck, [1, 1, 1, 1], num_classes)

    def run(self, problem: Problem, weights: dict[str, Tensor], after: Callable[[TheirStep], None]) -> None:
        """Call their ``main`` with these initial weights, and ``after`` after each step.

        Gradients are set to zero between steps instead of to None, as in the PyTorch that the code was written for.
        """
        recorder, zero_grad = Recorder(self.main, problem, weights, self.build, after), torch.optim.SGD.zero_grad
        with tempfile.TemporaryDirectory() as out, ExitStack() as stack:
            config = json.loads(json.dumps(self.config))
            config["training"].update(batch_size=problem.batch, num_workers=0)
            config["training"]["data"].update(labeled_samples=problem.labelled)
            config["training"]["data"]["input_size"] = f"{problem.size},{problem.size}"
            config["utils"].update(checkpoint_dir=out, save_checkpoint_every=10**9, val_per_iter=10**9)
            file = Path(out, "given.json")
            file.write_text(json.dumps(config), encoding="utf-8")
            patches = [
                mock.patch.object(sys, "argv", [self.script, "-c", str(file)]),
                mock.patch("numpy.long", int, create=True),
                mock.patch.object(Tensor, "cuda", lambda self, *_: self),
                mock.patch.object(nn.Module, "cuda", lambda self, *_: self),
                mock.patch.object(torch.optim.SGD, "zero_grad", lambda self: zero_grad(self, set_to_none=False)),
                torch.backends.cudnn.flags(),
                *(mock.patch.object(self.network, name, self.build) for name in dir(self.network) if "Res_" in name),
                mock.patch.object(self.source, "gtaLoader", lambda *_, **__: _Images("source", 10**6)),
            ]
            for patch in patches:
                stack.enter_context(patch)
            stack.enter_context(redirect_stdout(io.StringIO()))
            exec(settings_of(Path(self.folder, f"{self.script}.py").read_text(encoding="utf-8")), vars(self.main))
            for name, value in recorder.replacements().items():
                stack.enter_context(mock.patch.object(self.main, name, value, create=True))
            with suppress(_Finished):
                self.main.main()


def settings_of(source: str) -> Any:
    """The compiled ``__main__`` block of a script without the call of ``main``: it sets globals that ``main`` reads."""
    block = [node for node in ast.parse(source).body if isinstance(node, ast.If)][-1]
    return compile(ast.Module([line for line in block.body if ast.unparse(line) != "main()"], []), "settings", "exec")


class _Finished(Exception):
    """All steps are taken."""


@dataclass
class _Images:
    """Stands for a data set of theirs."""

    name: str
    size: int

    def __len__(self) -> int:
        return self.size


class _Loader:
    """Stands for a loader: images as floats from 0 to 255, BGR for the COCO weights, and labels."""

    def __init__(self, stream: Callable[[], Iterator[Batch]], bgr: bool) -> None:
        self.stream, self.bgr = stream, bgr

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        for images, labels in self.stream():
            yield (images.flip(1) if self.bgr else images).float(), labels, None, None, None


class Recorder:
    """Stands for functions and classes of the script ``main``: gives the data, and notes what happens."""

    def __init__(
        self,
        main: ModuleType,
        problem: Problem,
        weights: dict[str, Tensor],
        build: Callable[[int], nn.Module],
        after: Callable[[TheirStep], None],
    ) -> None:
        self.main, self.problem, self.weights, self.build, self.after = main, problem, weights, build, after
        self.losses: dict[str, float] = {}
        self.step = self.view = self.contrasts = 0

    def replacements(self) -> dict[str, Any]:
        """Globals of the script by name."""
        main, problem = self.main, self.problem
        transform, contrast = main.augmentationTransform, main.contrastive_class_to_class_learned_memory
        entropy = main.entropy_loss
        last = main.num_iterations
        return {
            "num_classes": problem.classes,
            "split_id": None,
            "range": lambda *bounds: self.steps() if bounds[-1] == last else range(*bounds),
            "data": SimpleNamespace(DataLoader=self.loader, sampler=SimpleNamespace(SubsetRandomSampler=list)),
            "get_loader": lambda _: lambda *_, **__: _Images("", problem.total),
            "model_zoo": SimpleNamespace(load_url=lambda _: self.weights),
            "random": SimpleNamespace(
                random=lambda: problem.coin(self.step, self.view), uniform=lambda low, _: low, seed=lambda _: None
            ),
            "adjust_learning_rate": self.adjust(main.adjust_learning_rate),
            "FeatureMemory": self.remember(main.FeatureMemory),
            "update_ema_variables": self.update(main.update_ema_variables),
            "augment_samples": self.augment(main.augment_samples),
            "augmentationTransform": lambda given, **maps: transform(
                {k: given[k] for k in {"Mix"} & set(given)}, **maps
            ),
            "CrossEntropy2d": self.loss("supervised", main.CrossEntropy2d),
            "CrossEntropyLoss2dPixelWiseWeighted": self.loss("pseudo", main.CrossEntropyLoss2dPixelWiseWeighted),
            "entropy_loss": lambda *args: self.note("entropy", entropy(*args)),
            "contrastive_class_to_class_learned_memory": lambda *args: self.note(self.contrast(), contrast(*args)),
        }

    def steps(self) -> Iterator[int]:
        for step in self.problem.steps:
            self.step, self.losses, self.view, self.contrasts = step, {}, 0, 0
            torch.manual_seed(step)
            yield step
        raise _Finished

    def loader(self, dataset: _Images, sampler: list[int], **_: Any) -> _Loader:
        name = dataset.name or ("labelled" if len(sampler) == self.problem.labelled else "unlabelled")
        return _Loader(self.problem.streams[name], self.main.pretraining == "COCO")

    def note(self, name: str, value: Any) -> Any:
        """Note a term with its factor in the sum, which is the gradient of the sum."""
        self.losses[name] = 0.0
        if isinstance(value, Tensor):
            value.register_hook(lambda grad: self.losses.update({name: float(grad * value.detach())}))
        return value

    def contrast(self) -> str:
        self.contrasts += 1
        return "contrast_labelled" if self.contrasts == 1 else "contrast_unlabelled"

    def loss(self, name: str, kind: type[nn.Module]) -> Callable[..., nn.Module]:
        def build(*args: Any, **options: Any) -> nn.Module:
            module = kind(*args, **options)
            module.register_forward_hook(lambda _, __, value: self.note(name, value))
            return module

        return build

    def adjust(self, function: Callable[..., None]) -> Callable[..., None]:
        def adjust(optimizer: Any, step: int) -> None:
            function(optimizer, step)
            self.lr = optimizer.param_groups[0]["lr"]

        return adjust

    def remember(self, kind: type) -> Callable[..., Any]:
        def build(memory_per_class: int, **options: Any) -> Any:
            self.capacity, self.memory = memory_per_class, kind(memory_per_class=self.problem.memory_rows, **options)
            return self.memory

        return build

    def update(self, function: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        def update(**options: Any) -> nn.Module:
            teacher = function(**options)
            self.after(TheirStep(self.step, self.lr, self.losses, options["model"], teacher, self.memory.memory))
            return teacher

        return update

    def augment(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Theirs, with classes that are chosen by :meth:`Problem.ascending`."""

        def augment(*args: Any, **options: Any) -> Any:
            images = iter(range(self.problem.batch))

            def choose(n: int, k: int, replace: bool) -> list[int]:
                first = self.problem.ascending(self.step, self.view, next(images))
                return list(range(k) if first else range(n - k, n))

            with mock.patch("numpy.random.choice", choose):
                result = function(*args, **options)
            self.view += 1
            return result

        return augment
