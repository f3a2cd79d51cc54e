"""The training loop that Alonso et al. released, run from a checkout of their code; nothing of it is stored here.

Their script is imported, its settings come from its own ``__main__`` block and one of its own configurations, and its
``main`` is called. Replaced are what needs data, a GPU or a download, the depth of the network, the size of the memory,
the range of the steps, and every augmentation but ClassMix.
"""

from __future__ import annotations

import ast
import importlib
import io
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, redirect_stdout, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from train.data.batches import Batch
from train.errors import UserError, reason
from train.paper.rows import Row
from train.paper.small_problem import Problem

UNUSED = ("kornia", "cv2", "scipy", "scipy.misc")
"""Libraries that the script imports to read and augment images, which is not done here."""
GENERIC = ("data", "model", "utils")
"""Packages of theirs whose names others may have too."""
NETWORKS = {"deeplab_v2": "deeplabv2_imagenet", "deeplab_v2_coco": "deeplabv2", "deeplab_v3plus": "deeplabv3"}


@dataclass
class TheirStep:
    """The state after a step; the loop goes on to change it."""

    step: int
    lr: float
    losses: dict[str, float]  # by our names, each with the factor that it has in the sum
    student: nn.Module
    teacher: nn.Module
    memory: list[Any]  # of each class rows [N, D], the newest first, or None


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
        kind = "v3" if row.network == "deeplab_v3plus" else row.pretraining.replace("ImageNet", "imagenet")
        part = f"{'pascal' if row.dataset == 'voc' else 'city'}_{row.ratio.replace('/', '_')}"
        files = f"{self.script}.py", f"configs/configSSL_{part}_split0_{kind}.json"
        for file in files:
            if not (self.folder / file).is_file():
                raise self._unusable(f"there is no {file}")
        self.config = json.loads((self.folder / files[1]).read_text(encoding="utf-8"))

    def _unusable(self, why: str) -> UserError:
        return UserError(f"--semiseg {self.folder}: {why}; give a checkout of github.com/Shathe/SemiSeg-Contrastive")

    def __enter__(self) -> TheirCode:
        self._own = {name: sys.modules.pop(name, None) for name in (*GENERIC, *UNUSED)}
        sys.modules.update({name: mock.MagicMock() for name in UNUSED})
        sys.path.insert(0, str(self.folder))
        try:
            with warnings.catch_warnings(action="ignore"):
                names = (self.script, f"model.{NETWORKS[self.row.network]}", "data.gta5_loader")
                self.main, self.network, self.source = map(importlib.import_module, names)
        except Exception as error:
            self.__exit__()
            raise self._unusable(f"{self.script}.py cannot be imported ({reason(error)})") from error
        return self

    def __exit__(self, *_: object) -> None:
        sys.path.remove(str(self.folder))
        for name, module in list(sys.modules.items()):
            places = [vars(module).get("__file__") or "", *(vars(module).get("__path__") or ())]
            named = name in UNUSED or name.split(".")[0] in GENERIC
            if named or any(place.startswith(str(self.folder)) for place in places):
                del sys.modules[name]
        sys.modules.update({name: module for name, module in self._own.items() if module is not None})

    def build(self, num_classes: int) -> nn.Module:
        """Their network with one block in each stage."""
        return self.network.ResNet(self.network.Bottleneck, [1, 1, 1, 1], num_classes)

    def run(self, problem: Problem, weights: dict[str, Tensor], after: Callable[[TheirStep], None]) -> None:
        """Call their ``main`` with these initial weights, and ``after`` after each step."""
        loop = _Loop(self, problem, weights, after)
        with tempfile.TemporaryDirectory() as out, ExitStack() as stack:
            config, training = dict(self.config), dict(self.config["training"])
            size = f"{problem.size},{problem.size}"
            data = training["data"] | {"labeled_samples": problem.labelled, "input_size": size}
            config["training"] = training | {"batch_size": problem.batch, "num_workers": 0, "data": data}
            never = dict.fromkeys(("save_checkpoint_every", "val_per_iter"), 10**9)
            config["utils"] = config["utils"] | never | {"checkpoint_dir": out}
            Path(out, "given.json").write_text(json.dumps(config), encoding="utf-8")
            for patch in (
                redirect_stdout(io.StringIO()),
                torch.backends.cudnn.flags(),  # restores what the script sets
                mock.patch.object(sys, "argv", [self.script, "-c", f"{out}/given.json"]),
                mock.patch("numpy.long", int, create=True),
                mock.patch.object(Tensor, "cuda", lambda self, *_: self),
                mock.patch.object(nn.Module, "cuda", lambda self, *_: self),
                mock.patch.object(torch.optim.SGD, "zero_grad", lambda self: loop.zero_grad(self)),
                mock.patch.object(self.source, "gtaLoader", lambda *_, **__: range(10**6)),
                *(mock.patch.object(self.network, name, self.build) for name in dir(self.network) if "Res_" in name),
            ):
                stack.enter_context(patch)
            exec(settings_of((self.folder / f"{self.script}.py").read_text(encoding="utf-8")), vars(self.main))
            for name, value in loop.replacements().items():
                stack.enter_context(mock.patch.object(self.main, name, value, create=True))
            with suppress(_Finished):
                self.main.main()


def settings_of(source: str) -> Any:
    """The compiled ``__main__`` block of a script without the call of ``main``: it sets globals that ``main`` reads."""
    block = [node for node in ast.parse(source).body if isinstance(node, ast.If)][-1]
    return compile(ast.Module([line for line in block.body if ast.unparse(line) != "main()"], []), "settings", "exec")


class _Finished(Exception): ...


class _Loop:
    """Stands in for functions and classes of the script: gives the data, and notes what happens."""

    def __init__(
        self, code: TheirCode, problem: Problem, weights: dict[str, Tensor], after: Callable[[TheirStep], None]
    ) -> None:
        self.main, self.problem, self.weights, self.after = code.main, problem, weights, after
        self.bgr = code.row.pretraining == "COCO"
        self.losses: dict[str, float] = {}
        self.step = self.view = 0
        self._zero_grad = torch.optim.SGD.zero_grad

    def replacements(self) -> dict[str, Any]:
        """Globals of the script by name."""
        main, problem, last = self.main, self.problem, self.main.num_iterations
        transform = main.augmentationTransform
        replaced: dict[str, Any] = {
            "num_classes": problem.classes,
            "split_id": None,
            "range": lambda *bounds: self.steps() if bounds[-1] == last else range(*bounds),
            "data": SimpleNamespace(DataLoader=self.loader, sampler=SimpleNamespace(SubsetRandomSampler=len)),
            "get_loader": lambda _: lambda *_, **__: range(problem.total),
            "model_zoo": SimpleNamespace(load_url=lambda _: self.weights),
            "random": SimpleNamespace(
                random=lambda: problem.coin(self.step, self.view), uniform=lambda low, _: low, seed=lambda _: None
            ),
            "augmentationTransform": lambda given, **maps: transform(
                {k: v for k, v in given.items() if k == "Mix"}, **maps
            ),
        }
        stand_ins: dict[str, Callable[..., Any]] = {
            "FeatureMemory": self.build_memory,
            "update_ema_variables": self.update,
            "augment_samples": self.augment,
            "CrossEntropy2d": partial(self.build_loss, "supervised"),
            "CrossEntropyLoss2dPixelWiseWeighted": partial(self.build_loss, "pseudo"),
            "entropy_loss": partial(self.call_loss, "entropy"),
            "contrastive_class_to_class_learned_memory": partial(self.call_loss, "contrast"),
        }
        return replaced | {name: partial(stand_in, getattr(main, name)) for name, stand_in in stand_ins.items()}

    def steps(self) -> Iterator[int]:
        for step in self.problem.steps:
            self.step, self.view, self.losses = step, 0, {}
            torch.manual_seed(step)
            yield step
        raise _Finished

    def loader(self, dataset: range, sampler: int, **_: Any) -> _Batches:
        p = self.problem
        name = {p.labelled: "labelled", p.total - p.labelled: "unlabelled"}.get(sampler, "source")
        return _Batches(p.streams[name], self.bgr)

    def zero_grad(self, optimizer: torch.optim.SGD) -> None:
        """To zero, not to None: as in the PyTorch that the code was written for."""
        self.optimizer = optimizer
        self._zero_grad(optimizer, set_to_none=False)

    def build_memory(self, theirs: Any, memory_per_class: int, **options: Any) -> Any:
        self.memory = theirs(memory_per_class=self.problem.memory_rows, **options)
        return self.memory

    def build_loss(self, name: str, theirs: Any, *args: Any, **options: Any) -> nn.Module:
        module = theirs(*args, **options)
        module.register_forward_hook(lambda *call: self.note(name, call[-1]))
        return module

    def call_loss(self, name: str, theirs: Any, *args: Any) -> Any:
        if name == "contrast":
            name = "contrast_unlabelled" if "contrast_labelled" in self.losses else "contrast_labelled"
        value = theirs(*args)
        self.note(name, value)
        return value

    def note(self, name: str, value: Any) -> None:
        """Note a term with its factor in the sum, which is the gradient that arrives at it."""
        self.losses[name] = 0.0
        if isinstance(value, Tensor):
            value.register_hook(lambda grad: self.losses.update({name: float(grad * value.detach())}))

    def update(self, theirs: Any, **options: Any) -> nn.Module:
        teacher, lr = theirs(**options), self.optimizer.param_groups[0]["lr"]
        self.after(TheirStep(self.step, lr, self.losses, options["model"], teacher, self.memory.memory))
        return teacher

    def augment(self, theirs: Any, *args: Any, **options: Any) -> Any:
        images = iter(range(self.problem.batch))

        def choose(n: int, k: int, replace: bool) -> list[int]:
            first = self.problem.ascending(self.step, self.view, next(images))
            return list(range(k) if first else range(n - k, n))

        with mock.patch("numpy.random.choice", choose):
            result = theirs(*args, **options)
        self.view += 1
        return result


@dataclass
class _Batches:
    """Stands in for a loader: images as floats from 0 to 255, BGR for the COCO weights, and labels."""

    stream: Callable[[], Iterator[Batch]]
    bgr: bool

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        for images, labels in self.stream():
            yield (images.flip(1) if self.bgr else images).float(), labels, None, None, None
