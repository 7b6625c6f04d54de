# Run by bash in a container of the main image. Prints what every operation
# answers; ends by giving all that changed one time, so that two runs can be compared.
start=$(date +%s)
cd /odd || exit 1
try() { "$@" 2>&1; echo "$? $*"; }
put() { echo "$2" >"$1"; echo "$? write $1"; }

# contents and attributes of files that lie in the image
echo more >>sizes/4097; echo $?
try dd if=/dev/zero of=sizes/5255225 bs=1000 seek=1234 count=3 conv=notrunc status=none
try truncate -s 10M sizes/sparse
try truncate -s 0 sizes/zeros
try chmod 0604 modes/file-0444
try chmod 0 modes/dir-0777
try chown 12:34 modes/file-0600
try chown 5:5 modes/file-4755
put modes/file-6711 "no longer setuid"
try touch -d @1234567890 times/1
try touch -h -d @1234567891 times/link
echo changed >>xattrs/capability; echo $?

# deleting, and other things in the place of what was deleted
try rm names/日本語 names/a,b "names/two words" names/-dash
try rm ./names/-dash
try rm -r names/deep
try rmdir sizes/empty
try rmdir many/99
try rm -r many/00
try mkdir many/00
put many/00/new "in an opaque directory"
try rm -r many/01
put many/01 "was a directory"
try rm many/02/00.txt
try mkdir many/02/00.txt
put many/02/00.txt/in "was a file"
try rm many/03/01.txt
try ln -s 02.txt many/03/01.txt
try rm -r lower/opaque
try mkdir lower/opaque
put lower/gone "again"
try mkdir lower/gone-dir
put lower/gone-dir/a "again"
try rm lower/gone

# renaming
try mv many/04/00.txt many/04/renamed
try mv many/04/01.txt many/05/moved
try mv many/04/02.txt many/04/03.txt
try mv many/06 many/moved
try mkdir upper
put upper/a a
try mv upper upper2
try mv upper2 many/02/upper3
try mv many/07/00.txt lower/kept
try mv links/one links/uno

# links, devices, fifos
try ln links/two links/four
echo through >>links/four; echo $?
try rm links/elsewhere/three
try rm links/relative
try ln -s /odd/links/uno links/new
try mknod devices/zero c 1 5
try mkfifo devices/pipe
try rm devices/block
echo gone >devices/null; echo $?
try head -c 4 devices/null

/usr/bin/python3 - <<'EOF'
import errno, fcntl, mmap, os

def say(name, call):
    try:
        print(name, call())
    except OSError as e:
        print(name, errno.errorcode[e.errno])

say("rename a directory of the image", lambda: os.rename("many/08", "many/eight"))
say("rename a directory onto a full one", lambda: os.rename("many/00", "many/09"))
say("rename a file onto a directory", lambda: os.rename("many/10/00.txt", "many/10"))
say("set an attribute", lambda: os.setxattr("xattrs/user", "user.one", b"changed"))
say("add an attribute", lambda: os.setxattr("xattrs/dir", "user.more", b"new"))
say("remove an attribute", lambda: os.removexattr("xattrs/user", "user.two"))
say("remove a missing attribute", lambda: os.removexattr("xattrs/user", "user.none"))
say("read an attribute", lambda: os.getxattr("xattrs/user", "user.one"))
say("create exclusively", lambda: os.open("many/11/00.txt", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
say("create exclusively what was deleted", lambda: os.close(os.open("many/03/../../names/a,b", os.O_CREAT | os.O_EXCL | os.O_WRONLY)))
say("open a directory for writing", lambda: os.open("many/11", os.O_WRONLY))
say("list", lambda: sorted(os.listdir("many/04"))[:4])
say("count", lambda: len(os.listdir("many")))
say("links", lambda: os.stat("links/four").st_nlink)

def unnamed():
    fd = os.open("many/12", os.O_TMPFILE | os.O_RDWR, 0o640)
    os.write(fd, b"had no name")
    os.link("/proc/self/fd/%d" % fd, "many/12/named", follow_symlinks=True)
    os.close(fd)
say("a file without a name", unnamed)

def mapped():
    with open("sizes/1048576", "r+b") as f:
        m = mmap.mmap(f.fileno(), 0)
        m[5000:5006] = b"mapped"
        m.flush()
        m.close()
say("write through a mapping", mapped)

def copied_up_while_open():
    with open("sizes/4096", "rb") as old, open("sizes/4096", "ab") as new:
        new.write(b"tail")
        new.flush()
        return len(old.read()), os.fstat(new.fileno()).st_size
say("read what was open before the first write", copied_up_while_open)

def locked():
    with open("sizes/4095", "rb") as a:
        fcntl.flock(a, fcntl.LOCK_EX | fcntl.LOCK_NB)
say("lock", locked)

def deleted_while_open():
    f = open("sizes/1048577", "rb")
    os.unlink("sizes/1048577")
    return len(f.read())
say("read what was deleted while open", deleted_while_open)
EOF

end=$(date -d '+1 hour' +%s)
find /odd -newermt "@$((start - 1))" ! -newermt "@$end" -exec touch -h -d @1700000000 {} +
