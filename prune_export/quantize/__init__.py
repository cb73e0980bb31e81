"""The quantizers; a file's name is its name in a recipe (`quantize: {method: gptq}`).

A quantizer puts weights on grids of few values. The checkpoint stays a plain one, of floats; beside
it lie the grids (`checkpoint/grid_file.py`), by which exporters write the codes exactly.
"""
