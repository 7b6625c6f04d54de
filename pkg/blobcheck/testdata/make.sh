#!/bin/bash
# Makes the images of this directory with the real nydus-image (2.2.0).
# Usage: make.sh DIRECTORY    (nydus-image, python3, zstd and tar in PATH)
set -euo pipefail
out=$(realpath "$1")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
mkdir -p "$out/blobs"

# Two layers with text, noise, a small file and a large one; the second repeats one file
# of the first and hides another.
python3 - <<'PY'
import os, random
noise = random.Random(1)
for layer in 1, 2:
    os.makedirs(f'l{layer}/d')
    def write(name, data): open(f'l{layer}/{name}', 'wb').write(data)
    write('d/text', b''.join(b'%d\n' % (n * layer) for n in range(4000)))
    write('d/noise', noise.randbytes(9000))
    write(f'name{layer}', b'layer %d\n' % layer)
    write(f'd/large{layer}', b''.join(b'%016d' % (n // 512 + layer) for n in range(80_000)))
os.link('l1/d/large1', 'l2/again')
PY
find . -exec touch -h -d @1700000000 {} +

image() { nydus-image "$@" >>log 2>&1 || { tail -5 log >&2; return 1; }; }
digest() { sha256sum "$1" | cut -d' ' -f1; }

# keep NAME: the image boot with the blobs in the directory blobs, which is emptied.
keep() {
	gzip -n9 <boot >"$out/$1.boot.gz"
	for b in blobs/*; do gzip -n9 <"$b" >"$out/$b.gz"; done
	rm -rf blobs && mkdir blobs
}

# merge ARGUMENT...: the layers' bootstraps in layers into boot.
merge() { (cd layers && nydus-image merge -D ../blobs -B ../boot "$@") >>log 2>&1 || { tail -5 log >&2; return 1; }; }

# member BLOB NAME: the content of one member of a blob with inlined metadata, where each
# tar header follows its content; with its header when there is a third argument.
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

mkdir blobs layers
for v in 5 6; do
	for c in none lz4_block zstd; do
		rm l1/d/large1 # without compression it would be large here too
		image create --type directory --fs-version $v --compressor $c --digester sha256 --chunk-size 0x1000 -D blobs -B boot l1
		cp -a l2/again l1/d/large1
		keep v$v-$c-4k
	done
	for c in lz4_block zstd; do
		for size in 0x10000 0x100000 0x1000000; do
			image create --type directory --fs-version $v --compressor $c --chunk-size $size -D blobs -B boot l1
			keep v$v-$c-$size
		done
	done
	rm -f layers/*
	ids=()
	for l in 1 2; do
		image create --type directory --fs-version $v --chunk-size 0x1000 -D blobs -B boot l$l
		ids+=("$(nydus-image check boot 2>/dev/null | sed -n 's/^\s*0: \([0-9a-f]*\),.*/\1/p')")
		mv boot "layers/${ids[-1]}"
	done
	cp -a blobs both
	merge "${ids[@]}"
	keep v$v-merged
	rmdir blobs && mv both blobs
	image create --type directory --fs-version $v --chunk-size 0x1000 -D blobs --chunk-dict "bootstrap=layers/${ids[0]}" -B boot l2
	keep v$v-chunk-dict
done

# As converters do: metadata inlined into the blob, for full images and zran.
for toc in "" toc; do
	rm -f layers/*
	ids=() toc_digests=() toc_sizes=()
	for l in 1 2; do
		image create --type directory --fs-version 6 --chunk-size 0x1000 --blob-inline-meta --features blob-toc -b blob l$l
		ids+=("$(digest blob)")
		member blob image.boot | zstd -dq >"layers/${ids[-1]}"
		member blob rafs.blob.toc with-header >toc
		toc_digests+=("$(digest toc)") && toc_sizes+=("$(stat -c %s toc)")
		mv blob "blobs/${ids[-1]}"
	done
	comma() { local IFS=,; echo "$*"; }
	arguments=()
	[ -z "$toc" ] || arguments=(--blob-toc-digests "$(comma "${toc_digests[@]}")" --blob-toc-sizes "$(comma "${toc_sizes[@]}")")
	merge "${arguments[@]}" "${ids[@]}"
	keep v6-inline$toc
done

rm -f layers/*
tar -C l1 --sort=name --owner=0 --group=0 --mtime=@1700000000 -cf - . | gzip -n9 >l1.tar.gz
image create --type targz-ref --fs-version 6 --blob-inline-meta --features blob-toc -b blob l1.tar.gz
original=$(digest l1.tar.gz)
member blob image.boot | zstd -dq >"layers/$original"
member blob rafs.blob.toc with-header >toc
mv l1.tar.gz "blobs/$original"
merge --blob-digests "$(digest blob)" --blob-sizes "$(stat -c %s blob)" \
	--blob-toc-digests "$(digest toc)" --blob-toc-sizes "$(stat -c %s toc)" "$original"
keep v6-zran
