"""What a training run may set: named recipes and the hyper-parameters of fine-tuning jobs. No torch."""
