"""segmentation_models.pytorch, a plain loop, the memory contrast of Alonso et al.: python examples/smp_loop.py"""

import copy

import segmentation_models_pytorch as smp
import torch
from shapes import CLASSES, Shapes, steps_from_command_line
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from pixcontrast import ContrastBranch

steps = steps_from_command_line(__doc__)
model = smp.DeepLabV3Plus("resnet18", encoder_weights=None, classes=len(CLASSES), decoder_channels=64)
branch = ContrastBranch(64, len(CLASSES), dim=64, capacity=64, quota=8, threshold=0.5, loss_weight=0.1)
teacher, teacher_branch = copy.deepcopy(model).eval(), copy.deepcopy(branch).eval()
pairs = [(model, teacher), (branch.project, teacher_branch.project), (branch.predict, teacher_branch.predict)]
optimizer = torch.optim.AdamW([*model.parameters(), *branch.parameters()], lr=2e-3)


def forward(network, images):
    features = network.decoder(network.encoder(images))  # [B, 64, h, w]: what the classifier sees
    return features, network.segmentation_head(features)


for step, (images, labels) in enumerate(DataLoader(Shapes(8 * steps), batch_size=8)):
    features, logits = forward(model, images)
    segmentation = cross_entropy(logits, labels, ignore_index=255)
    contrast, stats = branch(features, labels, return_stats=True)
    optimizer.zero_grad()
    (segmentation + contrast).backward()
    optimizer.step()

    with torch.no_grad():  # the teacher is a moving average; its confident pixels of the right class are remembered
        for network, average in pairs:
            for own, other in zip(average.state_dict().values(), network.state_dict().values(), strict=True):
                own.lerp_(other, 0.1) if own.is_floating_point() else own.copy_(other)
        branch.remember(*forward(teacher, images), labels, teacher=teacher_branch)
    if step % 20 == 0 or step == steps - 1:
        accuracy = (logits.argmax(1) == labels)[labels != 255].float().mean()
        print(
            f"step {step}: cross-entropy {segmentation:.3f}, contrast {contrast:.4f}, "
            f"pixels right {accuracy:.2f}, memory {stats.memory_fill.tolist()}"
        )
