"""Masked language models and fine-tuned ones as Hugging Face folders: written, and read again."""

from distlm.models.plm.export.read import from_pretrained as from_pretrained
from distlm.models.plm.export.write import save_pretrained as save_pretrained
