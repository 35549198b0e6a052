package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	docker "github.com/fsouza/go-dockerclient"
	fastjson "github.com/segmentio/encoding/json"
)

// defaultDocker is the engine's usual address on this system.
var defaultDocker = map[bool]string{
	true:  "npipe:////./pipe/docker_engine",
	false: "unix:///var/run/docker.sock",
}[runtime.GOOS == "windows"]

const (
	// maxAnswer bounds what is read of any answer, in bytes. A list of 5,000
	// containers has 8 MB.
	maxAnswer = 64 << 20
	// maxStats bounds a stats answer, in bytes. One of two networks has 2 KB, one
	// of a thousand block devices on cgroup v1 1 MB.
	maxStats = 2 << 20
)

// engine is a Docker engine, or something else that speaks its API. It is only ever
// asked with GET.
type engine struct {
	client  *docker.Client
	shown   string // its address, without credentials
	base    string // what the paths of the API are appended to
	timeout time.Duration
	changed atomic.Bool // whether an answer told of another API version
	api     string      // the highest API version of the engine, such as "1.41"; unknown: ""
	oneShot bool        // whether stats can be had with one-shot
}

// newEngine prepares for the engine at endpoint: unix:///path, tcp://host:port,
// http://, https://, and npipe:// on Windows. tcp:// means TLS where certificates are
// set up, as tlsFromEnv tells. Each call to the engine may take as long as timeout.
// Nothing is asked of it yet.
func newEngine(endpoint string, timeout time.Duration) (*engine, error) {
	u, err := url.Parse(endpoint)
	if err != nil {
		// The error of url.Parse repeats its input, which may hold a password.
		return nil, errors.New("not a URL; want one such as unix:///var/run/docker.sock or tcp://host:2375")
	}
	var tlsConfig *tls.Config
	switch u.Scheme {
	case "unix":
		if u.Host != "" || u.Path == "" {
			return nil, errors.New("a unix socket needs an absolute path, with three slashes: unix:///var/run/docker.sock")
		}
	case "npipe":
		if runtime.GOOS != "windows" {
			return nil, errors.New("named pipes are there on Windows only; elsewhere it is unix:///var/run/docker.sock")
		}
	case "tcp", "http", "https":
		if u.Hostname() == "" || strings.Contains(u.Path, "@") {
			return nil, fmt.Errorf("no host in it; the form is %s://host:port", u.Scheme)
		}
		if u.Scheme != "http" {
			if tlsConfig, err = tlsFromEnv(u.Scheme == "https"); err != nil {
				return nil, err
			}
		}
		// As the docker CLI reads them: tcp is plain HTTP on port 2375, or TLS on 2376.
		port := "2375"
		if tlsConfig != nil {
			port = "2376"
		}
		if u.Scheme == "tcp" && u.Port() == "" {
			u.Host = net.JoinHostPort(u.Hostname(), port)
		}
		u.Scheme = "http"
		if tlsConfig != nil {
			u.Scheme = "https"
		}
	case "":
		return nil, errors.New("no scheme in it; want one such as unix:///var/run/docker.sock or tcp://host:2375")
	default:
		return nil, fmt.Errorf("cannot speak %s://; want unix://, tcp://, http:// or https://", u.Scheme)
	}
	endpoint = strings.TrimRight(u.String(), "/")
	client, err := docker.NewClient(endpoint)
	if err != nil {
		return nil, fmt.Errorf("%s: want a URL such as unix:///var/run/docker.sock or tcp://host:2375", err)
	}
	client.Dialer = &net.Dialer{Timeout: timeout}
	newTransport := func() *http.Transport {
		return &http.Transport{
			Proxy:           http.ProxyFromEnvironment,
			DialContext:     (&net.Dialer{Timeout: timeout}).DialContext,
			TLSClientConfig: tlsConfig,
			// As many as usually are in flight; the engine holds a goroutine for each.
			MaxIdleConnsPerHost: 128,
			// They are not closed for being idle: nothing of ours happens between sweeps.
		}
	}
	e := &engine{client: client, shown: withoutUser(u), base: endpoint, timeout: timeout}
	switch u.Scheme {
	case "http", "https":
		// WithTransport has no effect on these. And the library's own TLS does not
		// verify the engine where there is no ca.pem.
		client.HTTPClient.Transport = newTransport()
	default:
		client.WithTransport(newTransport)
		e.base = "http://engine" // the socket is dialed whatever the host
	}
	client.HTTPClient.Transport = bounded{client.HTTPClient.Transport}
	return e, nil
}

// String is the engine's address as it may be shown.
func (e *engine) String() string { return e.shown }

// tlsFromEnv reads DOCKER_TLS_VERIFY and DOCKER_CERT_PATH as the docker CLI does: a
// DOCKER_TLS_VERIFY that is not empty asks for TLS, with ca.pem, cert.pem and key.pem
// from DOCKER_CERT_PATH, by default DOCKER_CONFIG or ~/.docker. It returns nil where TLS is not asked
// for. The engine's certificate is always verified, against ca.pem alone. always asks for TLS
// whatever the environment says; without a DOCKER_CERT_PATH, the roots of the system vouch then.
// https://docs.docker.com/engine/security/protect-access/
func tlsFromEnv(always bool) (*tls.Config, error) {
	verify := os.Getenv("DOCKER_TLS_VERIFY") != ""
	if !verify && !always {
		return nil, nil
	}
	config := &tls.Config{MinVersion: tls.VersionTLS12}
	dir := os.Getenv("DOCKER_CERT_PATH")
	if dir == "" && !verify {
		return config, nil
	}
	if dir == "" {
		dir = os.Getenv("DOCKER_CONFIG")
	}
	if dir == "" {
		home, err := os.UserHomeDir()
		if err != nil {
			return nil, errors.New("DOCKER_TLS_VERIFY is set but neither DOCKER_CERT_PATH nor a home directory; set DOCKER_CERT_PATH to the folder with ca.pem, cert.pem and key.pem")
		}
		dir = filepath.Join(home, ".docker")
	}
	ca, err := os.ReadFile(filepath.Join(dir, "ca.pem"))
	if err != nil {
		return nil, fmt.Errorf("no certificate authority to verify the engine with: %w; DOCKER_CERT_PATH names the folder with ca.pem, cert.pem and key.pem", err)
	}
	config.RootCAs = x509.NewCertPool()
	if !config.RootCAs.AppendCertsFromPEM(ca) {
		return nil, fmt.Errorf("%s holds no certificate in PEM form", filepath.Join(dir, "ca.pem"))
	}
	cert, err := tls.LoadX509KeyPair(filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem"))
	switch {
	case err == nil:
		config.Certificates = []tls.Certificate{cert}
	case !errors.Is(err, fs.ErrNotExist): // an engine may want none of its clients
		return nil, fmt.Errorf("the client's certificate, cert.pem and key.pem in %s: %w", dir, err)
	}
	return config, nil
}

// bounded is a transport whose answers end after maxAnswer bytes, so that no engine can
// fill the memory.
type bounded struct{ http.RoundTripper }

func (b bounded) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := b.RoundTripper.RoundTrip(r)
	if err == nil {
		resp.Body = struct {
			io.Reader
			io.Closer
		}{io.LimitReader(resp.Body, maxAnswer), resp.Body}
	}
	return resp, err
}

// hello asks the engine for its API version, on which depends how stats are asked for,
// and returns how the engine calls itself, such as "Docker/20.10.24 (linux)".
// https://docs.docker.com/reference/api/engine/version/v1.41/#tag/System/operation/SystemPing
func (e *engine) hello(ctx context.Context) (server string, err error) {
	header, err := e.get(ctx, "/_ping", 1<<10, new(bytes.Buffer))
	if err != nil {
		return "", err
	}
	// Engines too old to tell are too old for one-shot.
	e.api, e.oneShot = header.Get("Api-Version"), false
	e.changed.Store(false)
	if api, err := docker.NewAPIVersion(e.api); err == nil {
		e.oneShot = api.GreaterThanOrEqualTo(docker.APIVersion{1, 41})
	}
	return header.Get("Server"), nil
}

// count is a number that an engine may have sent. It takes no allocation, as a pointer does.
type count struct {
	n    uint64
	sent bool
}

func counted(n uint64) count { return count{n, true} }

// UnmarshalJSON takes null for not sent, as encoding/json does where it can.
func (c *count) UnmarshalJSON(text []byte) error {
	if string(text) == "null" {
		return nil
	}
	n, err := strconv.ParseUint(string(text), 10, 64)
	if err != nil {
		kind := kindOf(text)
		if kind == "number" {
			kind += " " + string(text)
		}
		return &json.UnmarshalTypeError{Value: kind, Type: reflect.TypeFor[uint64]()}
	}
	*c = counted(n)
	return nil
}

// info is what is used of what an engine tells about itself.
type info struct {
	Name    string // that of its host
	Running count  `json:"ContainersRunning"`
	Paused  count  `json:"ContainersPaused"`
	Stopped count  `json:"ContainersStopped"`
}

// info asks the engine about itself.
// https://docs.docker.com/reference/api/engine/version/v1.41/#tag/System/operation/SystemInfo
func (e *engine) info(ctx context.Context) (info, error) {
	var body bytes.Buffer
	if _, err := e.get(ctx, "/info", maxStats, &body); err != nil {
		return info{}, err
	}
	var i info
	if err := json.Unmarshal(body.Bytes(), &i); err != nil {
		return info{}, rubbish{fmt.Errorf("/info: %w", err)}
	}
	return i, nil
}

// list returns the running containers, the paused ones among them. It is go-dockerclient's ListContainers with a faster decoder:
// of a thousand containers the list has a megabyte.
// https://docs.docker.com/reference/api/engine/version/v1.41/#tag/Container/operation/ContainerList
func (e *engine) list(ctx context.Context) ([]docker.APIContainers, error) {
	var body bytes.Buffer
	if _, err := e.get(ctx, "/containers/json", maxAnswer, &body); err != nil {
		return nil, err
	}
	var list []docker.APIContainers
	if err := fastjson.Unmarshal(body.Bytes(), &list); err != nil {
		return nil, rubbish{fmt.Errorf("the list of containers: %w", err)}
	}
	return list, nil
}

// inspect returns what the engine knows of a container beside its stats.
// https://docs.docker.com/reference/api/engine/version/v1.41/#tag/Container/operation/ContainerInspect
func (e *engine) inspect(ctx context.Context, id string) (*docker.Container, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, e.timeout, noAnswer(e.timeout))
	defer cancel()
	container, err := e.client.InspectContainerWithOptions(docker.InspectContainerOptions{ID: id, Context: ctx})
	return container, plainly(ctx, err)
}

// origin tells whose an answer is, where that makes a difference.
type origin struct{ windows, podman bool }

// stats reads a container's stats answer into body, as it came, and returns whose it is. It is asked for with one-shot where the engine can: without it the
// engine takes two samples, a second apart, for a percentage that nobody here reads.
// go-dockerclient's own Stats has no one-shot, its HTTP client does as it is told.
// https://docs.docker.com/reference/api/engine/version/v1.41/#tag/Container/operation/ContainerStats
func (e *engine) stats(ctx context.Context, id string, body *bytes.Buffer) (from origin, err error) {
	query := "stream=false"
	if e.oneShot {
		query += "&one-shot=true"
	}
	header, err := e.get(ctx, "/containers/"+url.PathEscape(id)+"/stats?"+query, maxStats, body)
	var status *docker.Error
	if errors.As(err, &status) && status.Status == http.StatusNotFound {
		return from, &docker.NoSuchContainer{ID: id}
	}
	if err != nil {
		return from, err
	}
	// os_type in the body came with API 1.52 only.
	from.windows = header.Get("Ostype") == "windows"
	from.podman = header.Get("Libpod-Api-Version") != ""
	return from, nil
}

// get asks for a path of the API that go-dockerclient has no fitting call for, and reads the answer's body into body. Its
// errors: *docker.Error for a status other than 2xx, noAnswer, rubbish, or that of the
// connection.
func (e *engine) get(ctx context.Context, path string, limit int64, body *bytes.Buffer) (http.Header, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, e.timeout, noAnswer(e.timeout))
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, e.base+path, nil)
	if err != nil {
		return nil, err
	}
	resp, err := e.client.HTTPClient.Do(req)
	if err != nil {
		return nil, plainly(ctx, err)
	}
	defer resp.Body.Close()
	_, err = body.ReadFrom(io.LimitReader(resp.Body, limit+1))
	if resp.StatusCode/100 != 2 {
		var message struct{ Message string }
		if json.Unmarshal(body.Bytes(), &message) != nil {
			message.Message = body.String()
		}
		return nil, &docker.Error{Status: resp.StatusCode, Message: firstLine(message.Message)}
	}
	if err != nil {
		if ctx.Err() != nil {
			return nil, plainly(ctx, err)
		}
		return nil, rubbish{fmt.Errorf("the answer broke off: %w", err)}
	}
	if int64(body.Len()) > limit {
		return nil, rubbish{fmt.Errorf("the answer has over %d bytes", limit)}
	}
	if api := resp.Header.Get("Api-Version"); api != e.api && api != "" {
		e.changed.Store(true)
	}
	return resp.Header, nil
}

// rubbish is the error of an answer that makes no sense.
type rubbish struct{ error }

func (r rubbish) Unwrap() error { return r.error }

// errStopped tells that a container stopped between the list and the question.
var errStopped = errors.New("it stopped while it was asked")

// isGone tells whether err says that a container does not run any more.
func isGone(err error) bool {
	var removed *docker.NoSuchContainer
	return errors.Is(err, errStopped) || errors.As(err, &removed)
}

// isConnectionError tells whether err came before there was an answer, but not for want of
// time: the container it came with may have nothing to do with it.
func isConnectionError(err error) bool {
	var (
		status *docker.Error
		late   noAnswer
		body   rubbish
	)
	return err != nil && !isGone(err) && !errors.As(err, &status) && !errors.As(err, &late) && !errors.As(err, &body)
}

// engineHint returns what to do about an engine that cannot be reached, behind a "; ",
// or nothing.
func engineHint(err error) string {
	var status *docker.Error
	switch {
	case errors.Is(err, fs.ErrPermission):
		return "; add this user to the group that owns the socket: usermod -aG docker USER"
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, docker.ErrConnectionRefused), strings.Contains(err.Error(), "refused"):
		return "; is Docker running, and is --docker its address?"
	case strings.Contains(err.Error(), "HTTP response to HTTPS client"), strings.Contains(err.Error(), "does not look like a TLS handshake"):
		return "; the engine does not speak TLS there: use http:// or unset DOCKER_TLS_VERIFY"
	case strings.Contains(err.Error(), "malformed HTTP response"), errors.As(err, &status) && strings.Contains(status.Message, "HTTP request to an HTTPS server"):
		return "; does the engine want TLS there? Set DOCKER_TLS_VERIFY=1 and DOCKER_CERT_PATH"
	}
	return ""
}
