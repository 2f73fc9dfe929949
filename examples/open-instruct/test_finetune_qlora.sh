#!/usr/bin/env bash
# LoRA on a 4-bit base with the arguments of open-instruct's finetune.py, as such a script is written today.
#
# Before:  accelerate launch --mixed_precision bf16 ... open_instruct/finetune.py --model_name_or_path ...
# Now:     peft-study finetune --mixed_precision bf16 ... --model_name_or_path ...
# Before:  python open_instruct/merge_lora.py --base_model_name_or_path ...
# Now:     peft-study merge --base_model_name_or_path ...
#
# These are the two changed lines. The launch arguments stay: one process trains here, on the batch that NUM_GPUS of
# them made together, and every argument without effect is named once. The defaults run on a CPU with the embedded
# model; set MODEL, TRAIN_FILE and OUTPUT for your own. Arguments of this script are added to the first command, and win:
#
#     examples/open-instruct/test_finetune_qlora.sh --max_train_steps 2
#
# The original trains on a sample of 90,000 rows. That file, from the whole mixture in train.json:
#
#     peft-study data sample train.json --sizes 90k --by source -o samples
#     MODEL=meta-llama/Llama-3.2-1B TRAIN_FILE=samples/sample-90000.jsonl examples/open-instruct/test_finetune_qlora.sh
#
# 4-bit needs bitsandbytes (pip install 'peft-study[quantized]'), which runs on a CPU too. The merge dequantises the base.
set -euo pipefail

MODEL=${MODEL:-smollm2-135m-instruct}
TRAIN_FILE=${TRAIN_FILE:-data/skills.jsonl}
OUTPUT=${OUTPUT:-output/skills_qlora}

NUM_GPUS=2
BATCH_SIZE_PER_GPU=1
TOTAL_BATCH_SIZE=32
GRADIENT_ACC_STEPS=$((TOTAL_BATCH_SIZE / NUM_GPUS / BATCH_SIZE_PER_GPU))

if [[ ! -e "$TRAIN_FILE" ]]; then
    peft-study data skills -o "$TRAIN_FILE"
fi

peft-study finetune \
    --mixed_precision bf16 \
    --num_machines 1 \
    --num_processes "$NUM_GPUS" \
    open_instruct/finetune.py \
    --model_name_or_path "$MODEL" \
    --use_flash_attn \
    --use_qlora \
    --use_lora \
    --lora_rank 64 \
    --lora_alpha 16 \
    --lora_dropout 0.1 \
    --tokenizer_name "$MODEL" \
    --use_slow_tokenizer \
    --train_file "$TRAIN_FILE" \
    --max_seq_length 2048 \
    --preprocessing_num_workers 16 \
    --checkpointing_steps epoch \
    --per_device_train_batch_size "$BATCH_SIZE_PER_GPU" \
    --gradient_accumulation_steps "$GRADIENT_ACC_STEPS" \
    --learning_rate 1e-4 \
    --lr_scheduler_type linear \
    --warmup_ratio 0.03 \
    --weight_decay 0. \
    --num_train_epochs 1 \
    --output_dir "$OUTPUT" \
    --with_tracking \
    --report_to tensorboard \
    --logging_steps 1 \
    "$@"

peft-study merge \
    --base_model_name_or_path "$MODEL" \
    --lora_model_name_or_path "$OUTPUT" \
    --output_dir "${OUTPUT%/}_merged" \
    --save_tokenizer
