"""Fine-tuning, and training with quantization in the loop, on TRL, PEFT and transformers' Llama."""
