package main

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/gofrs/flock"
)

// spool keeps batches in files, one each, in a folder of its own. Their names have time and count,
// so that a start needs to read none of them:
//
//	20261123T105436Z-0000000042-4000.json.gz
//
// is the 42nd batch, 4,000 metrics of which the oldest was measured at 10:54:36 UTC: the body of
// a request to Backstop, gzip'd. Its methods are called by one goroutine at a time, but for read.
type spool struct {
	dir string
	log *slog.Logger

	lock    *flock.Flock // nil while the folder is not ours
	folder  fs.FileInfo  // as it was when it became ours first, nil before
	counter uint64       // the highest in a name so far
	// What was logged already
	foreign bool   // that there are foreign files
	news    news   // of the folder
	bad     []file // set aside, oldest first
	// litter are files that could not be removed yet. They do not count for the limit: where
	// nothing can be removed, dropping more would free no room.
	litter []file
}

// file is one in the folder.
type file struct {
	name string
	size int64 // bytes on the disk
}

const (
	lockName  = "lock"
	badSuffix = ".bad"
)

var (
	spoolName = regexp.MustCompile(`^(\d{8}T\d{6}Z)-(\d{10,18})-(\d{1,9})\.json\.gz(\.bad)?$`)
	// unfinishedName is what renameio calls a file that it has not renamed yet.
	unfinishedName = regexp.MustCompile(`^\.\d{8}T\d{6}Z-\d{10,18}-\d{1,9}\.json\.gz\d+$`)
)

// maxCounter is the highest number that spoolName takes. The next one is 1.
const maxCounter = 1e18 - 1

const spoolTime = "20060102T150405Z"

// spoolTrouble says what is wrong with the folder dir as a spool, "" if nothing is, or if it is not
// there yet. A user who may write to it could forge or remove metrics, or redirect what is written.
func spoolTrouble(dir string) string {
	info, err := os.Stat(dir)
	switch {
	case errors.Is(err, syscall.ENOTDIR) || err == nil && !info.IsDir():
		return "not a folder"
	case err != nil:
		return ""
	case !isOwn(info):
		return "this folder belongs to another user: choose another one, or chown it"
	case runtime.GOOS != "windows" && info.Mode().Perm()&0o022 != 0:
		return fmt.Sprintf("other users may write to this folder (mode %#o): "+
			"choose another one, or chmod go-w it", info.Mode().Perm())
	}
	if !isLock(filepath.Join(dir, lockName)) {
		return fmt.Sprintf("%q in this folder is not from this program: "+
			"choose a folder of its own", lockName)
	}
	return ""
}

// isLock reports whether a file is one that open wrote, or is not there. A loss of power may have
// left zeros in it.
func isLock(path string) bool {
	info, err := os.Lstat(path)
	if err != nil {
		return true // open says why
	}
	if !info.Mode().IsRegular() || info.Size() > 32 {
		return false
	}
	holder, err := os.ReadFile(path)
	return err != nil || strings.Trim(string(holder), "0123456789\r\n\x00") == ""
}

var (
	// errSpoolTaken is the trouble with a folder that another daemon uses.
	errSpoolTaken = errors.New("another docker-stats-to-backstop uses this folder")
	// errSpoolUnfit is what spoolTrouble says of a folder.
	errSpoolUnfit = errors.New("not fit for a spool")
)

// isPermanent reports whether retrying open is pointless after err.
func isPermanent(err error) bool {
	for _, lasting := range []error{errSpoolTaken, errSpoolUnfit, fs.ErrPermission, fs.ErrExist,
		syscall.ENOTDIR, syscall.ELOOP, syscall.ENAMETOOLONG} {
		if errors.Is(err, lasting) {
			return true
		}
	}
	return false
}

// open makes the folder ours and returns the batches in it, oldest first, but those that are known
// already. It is called again until it succeeds. The error is errSpoolTaken, errSpoolUnfit, or what
// the system says.
//
// Once it was ours, another in its place is not taken, nor made where there is none: most likely a
// disk is not mounted, and what would be put into the stand-in would be out of sight when it is.
func (s *spool) open(known map[string]bool) ([]*batch, error) {
	if s.folder == nil {
		if err := makeFolder(s.dir); err != nil {
			return nil, err
		}
	}
	folder, err := os.Stat(s.dir)
	if err != nil {
		return nil, err
	}
	if s.folder != nil && !os.SameFile(folder, s.folder) && !s.hasAny(known) {
		return nil, errors.New("this folder is another one than before: is its disk mounted? " +
			"Restart to use this one")
	}
	if trouble := spoolTrouble(s.dir); trouble != "" {
		return nil, fmt.Errorf("%w: %s: %s", errSpoolUnfit, s.dir, trouble)
	}
	path := filepath.Join(s.dir, lockName)
	lock := flock.New(path, flock.SetPermissions(0o600))
	locked, err := lock.TryLock()
	if err != nil {
		return nil, err
	}
	if !locked {
		if holder, err := os.ReadFile(path); err == nil && len(holder) > 0 {
			return nil, fmt.Errorf("%w: process %s", errSpoolTaken, firstLine(string(holder)))
		}
		return nil, errSpoolTaken
	}
	entries, err := os.ReadDir(s.dir) // sorted, and so oldest first
	if err != nil {
		lock.Close()
		return nil, err
	}
	s.lock, s.folder, s.bad = lock, folder, nil
	_ = os.WriteFile(path, fmt.Appendln(nil, os.Getpid()), 0o600) // for the message above, no more
	return s.load(entries, known), nil
}

// hasAny reports whether there is any file of these names.
func (s *spool) hasAny(names map[string]bool) bool {
	for name := range names {
		if info, err := os.Lstat(filepath.Join(s.dir, name)); err == nil && info.Mode().IsRegular() {
			return true
		}
	}
	return false
}

// load looks at what is in the folder.
func (s *spool) load(entries []fs.DirEntry, known map[string]bool) []*batch {
	var (
		batches []*batch
		foreign []string
		litter  = map[string]bool{}
	)
	for _, f := range s.litter {
		litter[f.name] = true
	}
	for _, entry := range entries {
		name := entry.Name()
		parts := spoolName.FindStringSubmatch(name)
		switch {
		case name == lockName || known[name] || litter[name]:
			continue
		case unfinishedName.MatchString(name):
			s.remove(file{name: name}) // its batch was not queued yet when we were killed
			continue
		case parts == nil:
			foreign = append(foreign, name)
			continue
		}
		counter, _ := strconv.ParseUint(parts[2], 10, 64)
		s.counter = max(s.counter, counter)
		var size int64
		if info, err := entry.Info(); err == nil {
			size = onDisk(info.Size())
		}
		if parts[4] != "" {
			s.bad = append(s.bad, file{name, size})
			continue
		}
		metrics, _ := strconv.Atoi(parts[3])
		at, err := time.Parse(spoolTime, parts[1])
		if err != nil || !entry.Type().IsRegular() {
			s.setAside(file{name, size}, metrics, errors.New("not from this program"))
			continue
		}
		batches = append(batches, &batch{file: name, size: size, count: metrics, oldest: at.Unix()})
	}
	if len(foreign) > 0 && !s.foreign {
		s.foreign = true
		s.log.Warn("foreign files in the spool folder, ignoring them",
			"files", len(foreign), "example", foreign[0])
	}
	return batches
}

// makeFolder makes the folder dir and those above it, private and durable.
func makeFolder(dir string) error {
	if _, err := os.Stat(dir); err == nil {
		return nil
	}
	if parent := filepath.Dir(dir); parent != dir {
		if err := makeFolder(parent); err != nil {
			return err
		}
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		if info, _ := os.Stat(dir); info != nil && info.IsDir() { // somebody was faster
			return nil
		}
		return err
	}
	_ = syncFolder(filepath.Dir(dir)) // that may not be ours to open
	return nil
}

func (s *spool) isOpen() bool { return s.lock != nil }

// check returns nil if the folder is open, still there and still ours, else why not.
func (s *spool) check() error {
	if !s.isOpen() {
		return errors.New("closed")
	}
	there, err := os.Lstat(filepath.Join(s.dir, lockName))
	if err != nil {
		return err
	}
	if ours, err := s.lock.Stat(); err != nil || !os.SameFile(there, ours) {
		return errors.New("the folder, or the file " + lockName + " in it, was replaced")
	}
	return nil
}

// close lets others have the folder.
func (s *spool) close() {
	if s.lock != nil {
		s.lock.Close()
		s.lock = nil
	}
}

// write puts a packed body into a file and into safety: after it, it outlives a loss of power.
func (s *spool) write(packed []byte, oldest int64, metrics int) (file, error) {
	name, err := s.newName(oldest, metrics)
	if err != nil {
		return file{}, err
	}
	f := file{name, onDisk(int64(len(packed)))}
	if err := writeDurably(s.dir, name, packed); err != nil {
		s.remove(f) // it may be there, though not in safety
		return file{}, err
	}
	return f, nil
}

// newName returns a name that no file has, for so many metrics.
func (s *spool) newName(oldest int64, metrics int) (string, error) {
	at := time.Unix(oldest, 0).UTC().Format(spoolTime)
	for {
		s.counter = s.counter%maxCounter + 1
		name := fmt.Sprintf("%s-%010d-%d.json.gz", at, s.counter, metrics)
		_, err := os.Lstat(filepath.Join(s.dir, name))
		if errors.Is(err, fs.ErrNotExist) {
			return name, nil
		}
		if err != nil {
			return "", err
		}
	}
}

// spoiltError says that a file is not what write wrote.
type spoiltError struct{ error }

// read returns the body in a file. The error is a spoiltError, or what the system says.
func (s *spool) read(name string) (body []byte, err error) {
	path := filepath.Join(s.dir, name)
	info, err := os.Lstat(path)
	switch {
	case err != nil:
		return nil, err
	case !info.Mode().IsRegular() || info.Size() > maxBody:
		return nil, &spoiltError{errors.New("not from this program")}
	}
	packed, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	body, err = unpack(packed)
	if err != nil {
		return nil, &spoiltError{err}
	}
	metrics, err := decode(body)
	if err == nil && len(metrics) == 0 {
		err = errors.New("no metric in it")
	}
	if err != nil {
		return nil, &spoiltError{err}
	}
	return encode(metrics), nil
}

// trouble returns what is wrong with the folder or with this process, nil if err, from read, is
// about one file only.
func (s *spool) trouble(err error) error {
	var spoilt *spoiltError
	if errors.As(err, &spoilt) {
		return nil
	}
	if trouble := s.check(); trouble != nil {
		return trouble
	}
	if errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE) {
		return err
	}
	return nil
}

// remove removes a file, now or, where that fails or the folder is not ours, at some tidy.
func (s *spool) remove(f file) {
	if s.check() != nil {
		s.litter = append(s.litter, f)
		return
	}
	path := filepath.Join(s.dir, f.name)
	if err := os.Remove(path); err == nil || errors.Is(err, fs.ErrNotExist) {
		return
	}
	// A read-only disk refuses to remove even what it does not have.
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		s.litter = append(s.litter, f)
	}
}

// tidy tries again to remove what could not be removed.
func (s *spool) tidy() {
	litter := s.litter
	s.litter = nil
	for _, f := range litter {
		s.remove(f)
	}
}

// setAside keeps a file that cannot be used for somebody to look at, as long as there is room.
func (s *spool) setAside(f file, metrics int, why error) {
	if errors.Is(why, fs.ErrNotExist) {
		s.log.Error("a spooled file is gone, and its metrics with it",
			"file", f.name, "metrics", metrics)
		return
	}
	s.log.Error("cannot use a spooled file, setting it aside",
		"file", f.name+badSuffix, "metrics", metrics, "error", errorText(why))
	old := filepath.Join(s.dir, f.name)
	f.name += badSuffix
	if err := os.Rename(old, filepath.Join(s.dir, f.name)); err == nil {
		s.bad = append(s.bad, f)
	}
}

// writeBad keeps metrics that the receiver refuses for somebody to look at, as long as there is
// room. It returns the name of their file, "" if it could not be written.
func (s *spool) writeBad(packed []byte, oldest int64, metrics int) string {
	if s.check() != nil {
		return ""
	}
	name, err := s.newName(oldest, metrics)
	if err == nil {
		name += badSuffix
		err = writeDurably(s.dir, name, packed)
	}
	if err != nil {
		return ""
	}
	s.bad = append(s.bad, file{name, onDisk(int64(len(packed)))})
	return name
}

// makeRoom removes files that were set aside, oldest first, until they and what else is held, in
// bytes, fit into limit or there are no more.
func (s *spool) makeRoom(held, limit int64) {
	for _, f := range s.bad {
		held += f.size
	}
	for held > limit && len(s.bad) > 0 {
		f := s.bad[0]
		s.bad = s.bad[1:]
		s.remove(f) // fails for a folder that somebody made: what is in it is not ours
		held -= f.size
	}
}

// fail closes the folder because of err, until it can be opened again.
func (s *spool) fail(err error) {
	if s.isOpen() {
		s.close()
		s.report(err)
	}
}

// report logs that the spool does not work, or works again, if that is news. Why does not count: it
// can have another file's name in it each time.
func (s *spool) report(err error) {
	state := ""
	if err != nil {
		state = "failed"
	}
	switch {
	case !s.news.isNew(state):
	case err != nil:
		s.log.Error("cannot use the spool, keeping metrics in memory", "error", errorText(err))
	default:
		s.log.Info("the spool works again")
	}
}
