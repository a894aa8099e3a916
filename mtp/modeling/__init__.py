"""What ships with every checkpoint: main with its head, and decoding. Flat, since transformers
copies a modeling file's relative imports by file name; imports torch, transformers and siblings.
"""
