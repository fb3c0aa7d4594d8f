"""Settings of a training run: named recipes and the hyper-parameters of fine-tuning jobs. No
torch.
"""
