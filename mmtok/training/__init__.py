"""Training over accelerate: one loop, objectives as two methods, exact resume."""

from mmtok.training.config import TrainConfig
from mmtok.training.loop import train
from mmtok.training.objective import AudioObjective, ImageObjective, Objective

__all__ = ["AudioObjective", "ImageObjective", "Objective", "TrainConfig", "train"]
