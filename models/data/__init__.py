"""Data sets that the zoo is trained on, read from a directory that the user names."""

from layercast.models.data.dataset import DataError, Dataset, stratified

__all__ = ["DataError", "Dataset", "stratified"]
