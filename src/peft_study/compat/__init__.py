"""The arguments of open-instruct's finetune.py and of accelerate's launcher, as this program's settings."""
