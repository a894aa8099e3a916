"""The code that ships with every checkpoint: main with its head, and decoding.

The folder is flat, since transformers copies a modeling file's relative imports by file name. It
imports torch, transformers and siblings only.
"""
