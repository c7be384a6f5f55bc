"""Training: one loop for every system. It sees a net with a loss, a loader with positions, and a stage."""

from isthmus.net import Net
from isthmus.training.loop import TrainResult, train
from isthmus.training.optim import lr_at
from isthmus.training.protocols import Loader, Position
from isthmus.training.stops import Interrupted, Preempted

__all__ = ["Interrupted", "Loader", "Net", "Position", "Preempted", "TrainResult", "lr_at", "train"]
