# debootstrap's first stage, and a file system of it: KEYRING INCLUDE MIRROR SIZE MKFS...
keyring=$1 include=$2 mirror=$3 size=$4
shift 4
PATH=$PATH:/usr/sbin:/sbin
rm -rf root root.ext4
sh "$DEBOOTSTRAP" --foreign --arch=amd64 --variant=minbase --include="$include" --keyring="$keyring" trixie root "$mirror"
# The second stage reads the lists of packages again and again: of Debian's 60,000, it needs those that are there.
ls root/var/cache/apt/archives | cut -d _ -f 1 >names
for list in root/var/lib/apt/lists/*_Packages; do
    awk 'FNR == NR { fetched[$1]; next } /^Package: / { wanted = $2 in fetched } wanted' names "$list" >few
    cp few "$list"
done
cp second-stage root/second-stage
chmod 755 root/second-stage
"$@" -q -d root root.ext4 "$size"
rm -rf root
