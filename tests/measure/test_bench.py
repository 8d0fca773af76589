from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from deploykit import measure
from deploykit.dataset import open_dataset
from deploykit.errors import InputError, UsageError
from deploykit.formats import onnx_file
from deploykit.measure import Candidate, bench, child, compare_speed, noise_floor, read_result
from deploykit.measure.lane import Lane
from deploykit.stages.take import TakeOptions, take
from deploykit.values import TensorSpec
from tests_measure_paths import FASHION_MNIST, FASHION_MODEL
