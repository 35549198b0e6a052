//go:build !windows

package main

import (
	"errors"
	"io"
	"io/fs"
	"net"
	"os"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// syncFolder waits until the names in a folder are on the disk.
func syncFolder(open func(name string) (*os.File, error), dir string) error {
	d, err := open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// isOwn tells whether a folder belongs to this process's user.
func isOwn(info fs.FileInfo) bool {
	stat, ok := info.Sys().(*syscall.Stat_t)
	return !ok || int(stat.Uid) == os.Geteuid()
}

// readNow reads what is there from conn. It returns os.ErrDeadlineExceeded if there is nothing yet.
// Reading with a short deadline would not do: when this process was stopped meanwhile, that returns
// without having looked.
func readNow(conn *net.TCPConn, p []byte) (n int, err error) {
	raw, _ := conn.SyscallConn() // fails for nil only
	closed := raw.Read(func(fd uintptr) bool {
		for {
			if n, err = syscall.Read(int(fd), p); err != syscall.EINTR {
				return true
			}
		}
	})
	switch {
	case closed != nil:
		return 0, closed
	case errors.Is(err, syscall.EAGAIN):
		return 0, os.ErrDeadlineExceeded
	case err != nil:
		return 0, os.NewSyscallError("read", err)
	case n == 0:
		return 0, io.EOF
	}
	return n, nil
}

// unacknowledged returns how many bytes that were written to conn the other side's system has not
// taken, as far as this system can tell.
func unacknowledged(conn *net.TCPConn) (n int) {
	if raw, err := conn.SyscallConn(); err == nil && runtime.GOOS == "linux" {
		_ = raw.Control(func(fd uintptr) {
			n, _ = unix.IoctlGetInt(int(fd), unix.TIOCOUTQ) // for a socket it is called SIOCOUTQ
		})
	}
	return n
}

// takeError returns SO_ERROR of a socket, 0 for none.
func takeError(fd uintptr) (code int, err error) {
	return unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR)
}
