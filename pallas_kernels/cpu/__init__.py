"""C++ for a CPU behind XLA's foreign function interface, compiled where it is first used.

`library` compiles, keeps and loads it; fp8_matmul.cpp is what XLA calls, tiles.inc its loops.
"""
