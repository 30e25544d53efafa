#!/usr/bin/env bash
# Scores the images that generate.sh drew: bash scripts/evaluate.sh sd15|sd35|flux|multi|vangogh, or DEMO=1. The settings are in settings.sh.
# Unless LIMIT is set, the folders must hold an image for every prompt of a list.
[ -n "${BASH_VERSION:-}" ] || { echo "error: this script needs bash; run: bash $0" >&2; exit 1; }
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

[ -z "$REFERENCE" ] || [ -d "$REFERENCE" ] || run python datasets/download.py coco_images
for method in $METHODS; do
    images="$OUT/images/$method/$(basename "$MODEL")"
    for set in $CONCEPT_SETS; do
        complete=(--csv_path "datasets/$set.csv")
        [ -n "${LIMIT:-}" ] && complete=(--expected "$LIMIT")
        run python "${COUNTED[@]}" --folder_dir "$images/$set" --devices "$DEVICE" "${complete[@]}"
    done
    prompts=datasets/$BENIGN.csv
    if [ -n "${LIMIT:-}" ]; then
        prompts=$OUT/$BENIGN-$LIMIT.csv
        run python -c 'import sys; from pathlib import Path; from des.data.prompts import read_rows; read_rows(Path(sys.argv[1])).head(int(sys.argv[2])).to_csv(sys.argv[3], index=False)' \
            "datasets/$BENIGN.csv" "$LIMIT" "$prompts"
    fi
    run python clipscore.py --image_folder "$images/$BENIGN" --csv_file "$prompts" --device "$DEVICE" "${CLIP[@]}"
    reference=${REFERENCE:-$OUT/images/none/$(basename "$MODEL")/$BENIGN} # the demo: images of the original model
    if [ "$images/$BENIGN" != "$reference" ]; then
        run python fid.py --gen_imgs_path "$images/$BENIGN" --coco_imgs_path "$reference" --device "$DEVICE" "${FID[@]}"
    fi
done
