"""Every pass, in the order in which one round runs them. A name is a promise to recipes that skip it."""

from __future__ import annotations

from compiler.optimize.contract import Pass
from compiler.optimize.fold_constants import FOLD_CONSTANTS
from compiler.optimize.fold_into_weights import FOLD_AFFINE, FOLD_BATCH_NORM
from compiler.optimize.fold_shapes import FOLD_SHAPES
from compiler.optimize.fuse_gelu import FUSE_GELU
from compiler.optimize.fuse_norms import FUSE_LAYER_NORM, FUSE_RMS_NORM
from compiler.optimize.infer_shapes import INFER_SHAPES
from compiler.optimize.inline_functions import INLINE_FUNCTIONS
from compiler.optimize.merge_casts import MERGE_CASTS
from compiler.optimize.merge_duplicates import MERGE_DUPLICATES
from compiler.optimize.merge_reshapes import MERGE_RESHAPES
from compiler.optimize.merge_transposes import MERGE_TRANSPOSES
from compiler.optimize.remove_dead import REMOVE_DEAD
from compiler.optimize.remove_identities import REMOVE_IDENTITIES

PASSES: tuple[Pass, ...] = (
    INLINE_FUNCTIONS,
    INFER_SHAPES,
    FOLD_CONSTANTS,
    FOLD_SHAPES,
    REMOVE_IDENTITIES,
    MERGE_CASTS,
    MERGE_TRANSPOSES,
    MERGE_RESHAPES,
    FOLD_BATCH_NORM,
    FOLD_AFFINE,
    FUSE_LAYER_NORM,
    FUSE_RMS_NORM,
    FUSE_GELU,
    MERGE_DUPLICATES,  # behind the folding into weights, which wants each Conv for itself
    REMOVE_DEAD,
)
