"""Sources that are built or run with the pinned llama.cpp; tutor's process imports none of them.

score.cpp, CMakeLists.txt  the program tutor-score, built with llama.cpp
convert.py                 starts llama.cpp's converter of models in a process of its own
convert_lora.py            starts llama.cpp's converter of LoRA adapters in a process of its own
"""
