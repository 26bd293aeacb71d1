"""funmatch: function matching knowledge distillation (Beyer et al. 2021, arXiv 2106.05237)."""

__version__ = "0.1.0"
