"""What every protocol asks of the features and labels that it is given."""

from torch import Tensor


def check_labelled(
    features_ND: Tensor, labels_N: Tensor, num_classes: int, name: str, may_be_empty: bool = False
) -> None:
    """Raise ValueError unless there is one label in [0, num_classes) for each row of finite features."""
    is_empty = len(labels_N) == 0
    has_shape = features_ND.ndim == 2 and labels_N.ndim == 1 and len(features_ND) == len(labels_N)
    if not has_shape or (is_empty and not may_be_empty):
        raise ValueError(
            f"{name}: features of shape {tuple(features_ND.shape)} with labels of shape {tuple(labels_N.shape)}; "
            "needs [N, D] and [N], N > 0"
        )
    if is_empty:
        return
    if labels_N.is_floating_point() or labels_N.min() < 0 or labels_N.max() >= num_classes:
        raise ValueError(f"{name}: labels must be integers in [0, {num_classes}), the number of classes")
    if not features_ND.isfinite().all():
        raise ValueError(f"{name}: {(~features_ND.isfinite()).any(1).sum().item()} rows have NaN or infinite features")
