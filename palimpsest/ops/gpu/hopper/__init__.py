"""The Hopper tier, in CUDA C++: compiled beforehand into sm_90a.zip by precompile, loaded and launched by launch."""
