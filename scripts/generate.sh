#!/usr/bin/env bash
# Draws images with the original model and with the one that train.sh protected: bash scripts/generate.sh sd15|sd35|flux|multi|vangogh, or DEMO=1.
# The settings, and the variables that change them, are in settings.sh.
[ -n "${BASH_VERSION:-}" ] || { echo "error: this script needs bash; run: bash $0" >&2; exit 1; }
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

protected=()
for i in "${ENCODERS[@]}"; do
    option=--text_encoder_path
    [ "$i" -gt 1 ] && option=--text_encoder_${i}_path
    protected+=("$option" "$(encoder_folder "$i")/checkpoint-$EPOCHS.pt")
done
for set in $CONCEPT_SETS $BENIGN; do
    fetch "$set"
    for method in $METHODS; do
        chosen=()
        [ "$method" = des ] && chosen=("${protected[@]}")
        run python generate.py --model_path "$MODEL" --device "$DEVICE" --prompts_csv "datasets/$set.csv" --output_path "$set" \
            --results_dir "$OUT/images" --training_method "$method" "${chosen[@]}" "${SAMPLING[@]}" "${END[@]}"
    done
done
