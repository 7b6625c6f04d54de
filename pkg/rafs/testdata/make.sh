#!/bin/bash
# Makes the bootstraps of this directory with the real nydus-image (2.2.0), and
# beside each what `nydus-image check` says of it, which the tests compare with.
# Usage: make.sh DIRECTORY    (nydus-image, python3, zstd and tar in PATH)
set -euo pipefail
out=$(realpath "$1")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

# Three small layers; the second repeats a file of the first.
for l in 1 2 3; do
	mkdir -p l$l/d
	for i in 1 2; do seq $((l * 1000 + i)) $((l * 1000 + i * 400)) >l$l/d/f$l$i; done
	printf 'layer %s\n' $l >l$l/name
	ln -s name l$l/link
done
cp l1/d/f11 l2/d/again
mkdir empty
find . -exec touch -h -d @1700000000 {} +

image() { nydus-image "$@" >>log 2>&1 || { tail -5 log >&2; return 1; }; }

# keep FILE NAME: into the output, with the oracle. Data lies in data, for the
# images that check does not look at without it.
keep() {
	gzip -n9 <"$1" >"$out/$2.boot.gz"
	nydus-image check -D data "$1" 2>/dev/null | grep -E '^RAFS|^\s+[0-9]+:' >"$out/$2.check"
}

# merge ARGUMENT...: into boot; the layers' bootstraps lie in layers.
merge() { (cd layers && nydus-image merge -D ../blobs -B ../boot "$@") >>log 2>&1 || { tail -5 log >&2; return 1; }; }

# digest FILE: its sha256 in hex.
digest() { sha256sum "$1" | cut -d' ' -f1; }

# member BLOB NAME: the content of one member of a blob with inlined metadata,
# where each tar header follows its content. With a third argument the content
# is followed by its header, as the digest of a ToC covers it.
member() {
	python3 - "$@" <<'PY'
import sys
data = open(sys.argv[1], 'rb').read()
end = len(data)
while end > 0:
    header = data[end-512:end]
    name, size = header[:100].rstrip(b'\0').decode(), int(header[124:136].rstrip(b'\0 '), 8)
    if name == sys.argv[2]:
        sys.stdout.buffer.write(data[end-512-size:end-512] + (header if len(sys.argv) > 3 else b''))
        sys.exit()
    end -= 512 + size
sys.exit('no ' + sys.argv[2])
PY
}

mkdir blobs layers data
for v in 5 6; do
	for c in none lz4_block zstd; do
		image create --type directory --fs-version $v --compressor $c --digester sha256 --chunk-size 0x1000 -D blobs -B boot l1
		keep boot v$v-$c
	done
	# merge takes the names of the layers' bootstraps as their blobs' ids.
	rm -f layers/*
	ids=()
	for l in 1 2 3; do
		image create --type directory --fs-version $v -D blobs -B boot l$l
		ids+=("$(nydus-image check boot 2>/dev/null | sed -n 's/^\s*0: \([0-9a-f]*\),.*/\1/p')")
		mv boot "layers/${ids[-1]}"
	done
	merge "${ids[@]}"
	keep boot v$v-merged
	merge "${ids[0]}" "${ids[1]}" "${ids[0]}"
	keep boot v$v-merged-same-layer-twice
	cp "layers/${ids[0]}" layers/first && cp "layers/${ids[1]}" layers/second
	merge first second
	keep boot v$v-bad-ids
	image create --type directory --fs-version $v -D blobs --chunk-dict "bootstrap=layers/${ids[0]}" -B boot l2
	keep boot v$v-chunk-dict
	image create --type directory --fs-version $v -D blobs -B boot empty
	keep boot v$v-empty
done

# As converters do: metadata inlined into the blob, for full images and zran.
layer() { tar -C $1 --sort=name --owner=0 --group=0 --mtime=@1700000000 -cf - . | gzip -n9 >$1.tar.gz; }
for l in 1 2; do layer l$l; done
rm -f layers/*
ids=()
for l in 1 2; do
	image create --type directory --fs-version 6 --blob-inline-meta --features blob-toc -b blob l$l
	id=$(digest blob)
	ids+=("$id")
	member blob image.boot | zstd -dq >layers/$id
	mv blob data/$id
done
keep "layers/${ids[0]}" v6-inline-layer
merge "${ids[@]}"
keep boot v6-inline-merged

rm -f layers/*
originals=() digests=() sizes=() toc_digests=() toc_sizes=()
for l in 1 2; do
	image create --type targz-ref --fs-version 6 --blob-inline-meta --features blob-toc -b blob l$l.tar.gz
	originals+=("$(digest l$l.tar.gz)")
	digests+=("$(digest blob)") && sizes+=("$(stat -c %s blob)")
	member blob image.boot | zstd -dq >"layers/${originals[-1]}"
	member blob rafs.blob.toc with-header >toc
	toc_digests+=("$(digest toc)") && toc_sizes+=("$(stat -c %s toc)")
	mv l$l.tar.gz "data/${originals[-1]}" && mv blob "data/${digests[-1]}"
done
comma() { local IFS=,; echo "$*"; }
merge --blob-digests "$(comma "${digests[@]}")" --blob-sizes "$(comma "${sizes[@]}")" \
	--blob-toc-digests "$(comma "${toc_digests[@]}")" --blob-toc-sizes "$(comma "${toc_sizes[@]}")" "${originals[@]}"
keep boot v6-zran-merged
# The ids of the blobs that hold the metadata, which check does not show.
printf '%s\n' "${digests[@]}" >"$out/v6-zran-merged.meta"
