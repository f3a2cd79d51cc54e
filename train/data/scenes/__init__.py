"""Generated scenes in the folder layouts of the published data sets: to try the whole trainer without a download.

They are pictures for learning, not for the eye: classes share their colours and differ in texture, shape and place, and
light, colour and arrangement vary strongly from image to image, so that few labelled images do not suffice.
"""

from train.data.scenes.layouts import make_scenes

__all__ = ["make_scenes"]
