#!/usr/bin/env bash
# Encodes the codebook and trains DES with the paper's settings: bash scripts/train.sh sd15|sd35|flux|multi|vangogh, or DEMO=1 bash scripts/train.sh.
# The settings, and the variables that change them, are in settings.sh.
[ -n "${BASH_VERSION:-}" ] || { echo "error: this script needs bash; run: bash $0" >&2; exit 1; }
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

training_lists
for n in "${!ENCODERS[@]}"; do
    i=${ENCODERS[$n]}
    run python save_codebook.py --model_path "$MODEL" --device "$DEVICE" --csv_path "$SAFE" --save_dir "$OUT/codebook" --encoder_idx "$i"
    memory=()
    [ "${BATCHES[$n]}" = 4 ] && memory=(--gradient_checkpointing --optimizer adamw8bit) # T5-XXL on a card of 40 GB
    run python train_des.py --model_path "$MODEL" --device "$DEVICE" --text_encoder_idx "$i" --codebook_dir "$OUT/codebook" \
        --unsafe_csv_path "$UNSAFE" --safe_csv_path "$SAFE" --output_dir "$OUT/checkpoints" --concept_prompt "$CONCEPT" "${ALPHA[@]}" \
        --learning_rate "$RATE" --num_epochs "$EPOCHS" --batch_size "${BATCHES[$n]}" --lambda_safe 0.3 --ablation 1 2 3 \
        --save_every "$EPOCHS" "${memory[@]}"
done
