package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	docker "github.com/fsouza/go-dockerclient"
	fastjson "github.com/segmentio/encoding/json"
)

var defaultDocker = map[bool]string{
	true:  "npipe:////./pipe/docker_engine",
	false: "unix:///var/run/docker.sock",
}[runtime.GOOS == "windows"]

// maxAnswer bounds any answer, in bytes. A list of 5,000 containers has 8 MB, and inspect can have
// 2.4 MB: the ids of 35,000 health checks.
const maxAnswer = 32 << 20

// engine is a Docker engine, or something else that speaks its API. It only gets GET requests.
// What its answers mean is in https://docs.docker.com/reference/api/engine/version/v1.41/, by the
// paths of the calls below. The types have the parts of them that are used.
type engine struct {
	client  *docker.Client
	shown   string // its address, without credentials
	base    string // what the paths of the API are appended to
	timeout time.Duration
	changed atomic.Bool // whether an answer had another API version
	api     string      // the highest API version of the engine, such as "1.41"; unknown: ""
	oneShot bool        // whether it knows one-shot stats
	inTicks bool        // whether it is known to answer for stats once a second only
	podman  bool
	windows bool // whether it says so at the start
}

// newEngine prepares for the engine at endpoint: unix:///path, tcp://host:port, http://,
// https://, and npipe:// on Windows. timeout bounds each call. Nothing is asked yet.
func newEngine(endpoint string, timeout time.Duration) (*engine, error) {
	u, tlsConfig, err := parseEndpoint(endpoint)
	if err != nil {
		return nil, err
	}
	base := strings.TrimRight(u.String(), "/")
	client, err := docker.NewClient(base)
	if err != nil {
		return nil, fmt.Errorf("%s; %s", err, wantEndpoint)
	}
	client.Dialer = &net.Dialer{Timeout: timeout}
	connections := newTransport(timeout)
	connections.TLSClientConfig = tlsConfig
	connections.MaxConnsPerHost = maxInFlight + 1 // that of /info
	// As many as usually are in flight; the engine holds a goroutine for each. They have no idle
	// timeout, which would cause wake-ups between sweeps.
	connections.MaxIdleConnsPerHost = 128
	if u.Scheme != "http" && u.Scheme != "https" {
		// This makes it dial the socket. It has no effect on the others: the library's own TLS
		// does not verify the engine if there is no ca.pem.
		client.WithTransport(func() *http.Transport { return connections })
		// Any host will do, but connections are counted by host, and this is the library's.
		base = "http://unix.sock"
	}
	client.HTTPClient.Transport = transport{connections, maxAnswer}
	client.HTTPClient.CheckRedirect = func(*http.Request, []*http.Request) error {
		return http.ErrUseLastResponse // another server would be asked
	}
	return &engine{client: client, shown: withoutUser(u), base: base, timeout: timeout}, nil
}

const wantEndpoint = "want one such as unix:///var/run/docker.sock or tcp://host:2375"

// parseEndpoint reads an engine's address. The scheme of u is unix, npipe, http or https. tlsConfig
// is nil if TLS is not wanted.
func parseEndpoint(endpoint string) (u *url.URL, tlsConfig *tls.Config, err error) {
	if !strings.Contains(endpoint, "://") {
		return nil, nil, errors.New("no scheme in it; " + wantEndpoint)
	}
	u, err = url.Parse(endpoint)
	if err != nil {
		// The error of url.Parse repeats its input, which may hold a password.
		return nil, nil, errors.New("not a URL; " + wantEndpoint)
	}
	switch u.Scheme {
	case "unix":
		if u.Host != "" || u.Path == "" {
			err = errors.New("a unix socket needs an absolute path, " +
				"with three slashes: unix:///var/run/docker.sock")
		}
	case "npipe":
		if runtime.GOOS != "windows" {
			err = errors.New("named pipes are there on Windows only; " +
				"elsewhere it is unix:///var/run/docker.sock")
		}
	case "tcp", "http", "https":
		tlsConfig, err = overNetwork(u)
	default:
		err = fmt.Errorf("cannot speak %s://; want unix://, tcp://, http:// or https://", u.Scheme)
	}
	return u, tlsConfig, err
}

// overNetwork turns u into an http or https URL as the docker CLI does: tcp is plain HTTP on port
// 2375, or TLS on 2376.
func overNetwork(u *url.URL) (tlsConfig *tls.Config, err error) {
	if u.Hostname() == "" || strings.Contains(u.Path, "@") {
		return nil, fmt.Errorf("no host in it; the form is %s://host:port", u.Scheme)
	}
	if u.RawQuery != "" || u.ForceQuery || u.Fragment != "" {
		return nil, fmt.Errorf("there is a ? or a # in it; the form is %s://host:port", u.Scheme)
	}
	if u.Scheme != "http" {
		if tlsConfig, err = tlsFromEnv(u.Scheme == "https"); err != nil {
			return nil, err
		}
	}
	scheme, port := "http", "2375"
	if tlsConfig != nil {
		scheme, port = "https", "2376"
	}
	if u.Scheme == "tcp" && u.Port() == "" {
		u.Host = net.JoinHostPort(u.Hostname(), port)
	}
	u.Scheme = scheme
	return tlsConfig, nil
}

func (e *engine) String() string { return e.shown }

func (e *engine) isAt(endpoint string) bool {
	u, _, err := parseEndpoint(endpoint)
	return err == nil && withoutUser(u) == e.shown
}

// tlsFromEnv reads DOCKER_TLS_VERIFY and DOCKER_CERT_PATH as the docker CLI does: a
// DOCKER_TLS_VERIFY that is not empty asks for TLS, with ca.pem, cert.pem and key.pem from
// DOCKER_CERT_PATH, by default DOCKER_CONFIG or ~/.docker. It returns nil if TLS is not asked for.
// The engine's certificate is always verified, against ca.pem alone. With always, TLS is used
// whatever the environment says; without DOCKER_CERT_PATH, the system's roots count then.
// https://docs.docker.com/engine/security/protect-access/
func tlsFromEnv(always bool) (*tls.Config, error) {
	verify := env("DOCKER_TLS_VERIFY") != ""
	if !verify && !always {
		return nil, nil
	}
	config := &tls.Config{MinVersion: tls.VersionTLS12}
	dir := env("DOCKER_CERT_PATH")
	if dir == "" && !verify {
		return config, nil
	}
	home, _ := os.UserHomeDir()
	dir = cmp.Or(dir, env("DOCKER_CONFIG"), filepath.Join(home, ".docker"))
	ca, err := readText(filepath.Join(dir, "ca.pem"))
	if err != nil {
		return nil, fmt.Errorf("no certificate authority to verify the engine with: %w; "+
			"DOCKER_CERT_PATH names the folder with ca.pem, cert.pem and key.pem", err)
	}
	config.RootCAs = x509.NewCertPool()
	if !config.RootCAs.AppendCertsFromPEM([]byte(ca)) {
		return nil, fmt.Errorf("%s holds no certificate in PEM form", filepath.Join(dir, "ca.pem"))
	}
	cert, err := tls.LoadX509KeyPair(filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem"))
	switch {
	case err == nil:
		config.Certificates = []tls.Certificate{cert}
	case !errors.Is(err, fs.ErrNotExist): // an engine may ask its clients for none
		return nil, fmt.Errorf("the client's certificate, cert.pem and key.pem in %s: %w", dir, err)
	}
	return config, nil
}

// hello asks the engine for its API version, which decides how to ask for stats. It returns what
// the engine calls itself, such as "Docker/20.10.24 (linux)".
func (e *engine) hello(ctx context.Context) (server string, err error) {
	header, err := e.get(ctx, "/_ping", &answer{isStream: true}) // nobody needs its OK
	if err != nil {
		return "", err
	}
	// Engines that do not send their version are too old for one-shot.
	e.api, e.oneShot = header.Get("Api-Version"), false
	e.podman = header.Get("Libpod-Api-Version") != ""
	e.changed.Store(false)
	if api, err := docker.NewAPIVersion(e.api); err == nil {
		e.oneShot = api.GreaterThanOrEqualTo(docker.APIVersion{1, 41})
	}
	server = header.Get("Server")
	e.windows = strings.Contains(server, "(windows)") || header.Get("Ostype") == "windows"
	e.inTicks = !e.oneShot || collectsInTicks(server)
	return server, nil
}

// collectsInTicks reports whether a server is a Docker engine before 23.0.8 or 24.0.7: those know
// one-shot, but wait for the next tick of their collector all the same.
func collectsInTicks(server string) bool {
	var major, minor, patch int
	n, _ := fmt.Sscanf(server, "Docker/%d.%d.%d", &major, &minor, &patch)
	return n == 3 &&
		(major < 23 || minor == 0 && (major == 23 && patch < 8 || major == 24 && patch < 7))
}

// count is a number that an engine may have sent. Unlike a pointer, it needs no allocation.
type count struct {
	n      uint64
	sent   bool
	broken bool // something was sent that is no count; n is kept if it was only too large
}

// tooLarge is no count: "no limit", or a counter that fell below 0.
const tooLarge = 1 << 63

func counted(n uint64) count { return count{n, n < tooLarge, n >= tooLarge} }

func (c count) absent() bool { return !c.sent && !c.broken }

// UnmarshalJSON takes null for not sent. It never fails: a number that is negative or has a
// fraction, or something else in its place, costs this count only.
func (c *count) UnmarshalJSON(text []byte) error {
	if string(text) == "null" {
		return nil
	}
	n, err := strconv.ParseUint(string(text), 10, 64)
	if err == nil || errors.Is(err, strconv.ErrRange) { // n is the largest there is then
		*c = counted(n)
		return nil
	}
	*c = count{broken: true}
	f, err := strconv.ParseFloat(string(text), 64) // such as 6.7108864e+07
	if err == nil && f >= 0 && f < tooLarge && f == math.Trunc(f) {
		*c = counted(uint64(f))
	}
	return nil
}

type info struct {
	Name     string // that of its host
	NCPU     count
	MemTotal count // bytes
	Stopped  count `json:"ContainersStopped"`
	OSType   string
}

// No other call costs the engine more: it starts other programs for their versions.
func (e *engine) info(ctx context.Context) (i info, err error) {
	_, err = ask(ctx, e, "/info", &i)
	return i, err
}

// listed is an entry in the list of containers.
type listed struct {
	ID      string `json:"Id"`
	Names   []string
	Image   string
	Created int64           // Unix seconds
	Labels  json.RawMessage // an object; few rules look at it
	State   string          // since API 1.23
	Status  string          // such as "Up 2 hours (healthy)"
	Health  health          // since API 1.52, and of Podman 6
}

type health struct{ Status string }

// list returns the containers that run, paused and restarting ones too, or all of them. at is the
// engine's time, in whole seconds: its clock may be another one than ours.
func (e *engine) list(ctx context.Context, all bool) (list []listed, at time.Time, err error) {
	path := "/containers/json"
	if all {
		path += "?all=1"
	}
	header, err := ask(ctx, e, path, &list)
	at, noDate := http.ParseTime(header.Get("Date"))
	if noDate != nil {
		at = time.Now()
	}
	return list, at, err
}

type inspected struct {
	RestartCount count
	State        struct {
		Running    bool // true of one that restarts, too
		Restarting bool // waits to be started again
		StartedAt  string
		ExitCode   int
		Health     health
	}
	Config     struct{ Image string }
	HostConfig struct {
		NanoCpus   count // 1e-9 CPUs
		CPUQuota   count `json:"CpuQuota"`  // µs of CPU time in each period
		CPUPeriod  count `json:"CpuPeriod"` // µs
		CpusetCpus string
	}
}

// state returns "running", "paused", "restarting", or another word for a container that does not
// run.
func (l *listed) state() string {
	switch {
	case l.State != "":
		return l.State
	case strings.HasPrefix(l.Status, "Restarting"):
		return "restarting"
	case strings.HasSuffix(l.Status, "(Paused)"):
		return "paused"
	case l.Status == "" || strings.HasPrefix(l.Status, "Up"):
		return "running"
	}
	return "exited"
}

// runs reports whether a container in a list of all of them is one of those that run.
func (l *listed) runs() bool {
	// The last is Podman's.
	return slices.Contains([]string{"running", "paused", "restarting", "stopping"}, l.state())
}

// textsOf decodes an object of texts, such as labels. It returns nil for what is none.
func textsOf(object json.RawMessage) (texts map[string]string) {
	_ = decodeLoosely(object, &texts)
	return texts
}

// healthStatus returns what the list says of a container's health, "" if it says nothing.
func (l *listed) healthStatus() string {
	switch {
	case l.Health.Status != "" && l.Health.Status != "none":
		return l.Health.Status
	case strings.Contains(l.Status, "(healthy)"):
		return "healthy"
	case strings.Contains(l.Status, "(unhealthy)"):
		return "unhealthy"
	case strings.Contains(l.Status, "(health: starting)"):
		return "starting"
	}
	return ""
}

// cpuLimit returns how many CPUs a container may use, 0 if there is no limit.
func (i *inspected) cpuLimit() (least float64) {
	host := &i.HostConfig
	period := cmp.Or(host.CPUPeriod.n, 100_000) // the kernel's default
	for _, limit := range [...]float64{
		float64(host.NanoCpus.n) / 1e9,
		float64(host.CPUQuota.n) / float64(period),
		float64(sizeOf(host.CpusetCpus)),
	} {
		if limit > 0 && (least == 0 || limit < least) {
			least = limit
		}
	}
	return least
}

// sizeOf returns how many CPUs a list such as "0-2,7" has, 0 if it is none.
func sizeOf(cpuset string) (size uint64) {
	for part := range strings.SplitSeq(cpuset, ",") {
		first, last, isRange := strings.Cut(strings.TrimSpace(part), "-")
		if !isRange {
			last = first
		}
		from, err := strconv.ParseUint(first, 10, 16)
		to, err2 := strconv.ParseUint(last, 10, 16)
		if err != nil || err2 != nil || to < from {
			return 0
		}
		size += to - from + 1
	}
	return size
}

// inspect returns what the engine knows of a container beside its stats. Its error is errStopped
// for one that is no more.
func (e *engine) inspect(ctx context.Context, id string) (*inspected, error) {
	found := new(inspected)
	_, err := ask(ctx, e, "/containers/"+url.PathEscape(id)+"/json", found)
	if statusOf(err) == http.StatusNotFound {
		return nil, errStopped
	}
	return found, err
}

// decodeLoosely reads JSON into a zero T. A value of another type than that of its field costs that
// field: fields that engines and proxies get wrong are many, and encoding/json goes on after one.
func decodeLoosely[T any](body []byte, into *T) error {
	// Other than encoding/json, fastjson takes what is nested so deep that its stack overflows.
	openers := bytes.Count(body, []byte("[")) + bytes.Count(body, []byte("{"))
	if openers < 10_000 || json.Valid(body) {
		if fastjson.Unmarshal(body, into) == nil {
			return nil
		}
	}
	*into = *new(T)
	err := json.NewDecoder(bytes.NewReader(body)).Decode(into) // of more values, the first
	var kind *json.UnmarshalTypeError
	switch whole := reflect.TypeFor[T](); {
	case !errors.As(err, &kind):
		return err
	case kind.Type != whole:
		return nil
	case whole.Kind() == reflect.Slice:
		return fmt.Errorf("%s instead of an array", jsonKind(kind))
	}
	return fmt.Errorf("%s instead of an object", jsonKind(kind))
}

type event struct {
	Type   string
	Action string
	Status string // the Action of engines before API 1.22
	ID     string `json:"id"` // likewise
	Actor  struct {
		ID         string
		Attributes json.RawMessage // an object: the container's name, image and labels
	}
	Time     int64 `json:"time"`     // Unix seconds
	TimeNano int64 `json:"timeNano"` // Unix ns, since API 1.22
}

// eventKey tells one event from all others.
type eventKey struct {
	id, action string
	at         int64 // Unix ns
}

func (one *event) key() eventKey {
	at := cmp.Or(one.TimeNano, one.Time*int64(time.Second))
	return eventKey{cmp.Or(one.Actor.ID, one.ID), cmp.Or(one.Action, one.Status), at}
}

type eventKind int

const (
	other     eventKind = iota
	started             // a container
	updated             // its limits
	ended               // with exit code 0
	failed              // ended with another one
	killed              // a process in it, as memory was short
	unhealthy           // by its health check
)

func (one *event) kind() eventKind {
	switch action := one.key().action; {
	case one.Type != "" && one.Type != "container":
	case action == "start":
		return started
	case action == "update":
		return updated
	case action == "die" || action == "died":
		attributes := textsOf(one.Actor.Attributes)
		if cmp.Or(attributes["exitCode"], attributes["containerExitCode"], "0") != "0" {
			return failed
		}
		return ended
	case action == "oom":
		return killed
	case strings.HasPrefix(action, "health_status") && strings.HasSuffix(action, "unhealthy"):
		return unhealthy
	}
	return other
}

// eventFilter asks for what is counted, and for updates. Podman has words of its own.
const eventFilter = `{"type":["container"],` +
	`"event":["start","die","died","oom","health_status: unhealthy","update"]}`

// events returns what happened to containers between two times of the engine's, both included.
// With until in the past, the engine answers at once, from its memory of the last 256 events. Some
// Podmans answer nothing then; there, it is what happened up to now. The bool reports whether the
// answer did not end. Docker up to 1.9 reads whole seconds only.
func (e *engine) events(ctx context.Context, since, until time.Time) ([]event, bool, error) {
	query := url.Values{"since": {unixSeconds(since)}, "filters": {eventFilter}}
	if e.podman {
		query.Set("stream", "false")
	} else {
		query.Set("until", unixSeconds(until))
	}
	stream := answer{isStream: true}
	if _, err := e.get(ctx, "/events?"+query.Encode(), &stream); err != nil {
		return nil, false, err
	}
	all, err := decodeEvents(stream.text)
	return all, stream.isOpen, err
}

// decodeEvents reads one JSON object after the other. A field of a wrong type costs itself.
func decodeEvents(body []byte) (all []event, err error) {
	for lines := json.NewDecoder(bytes.NewReader(body)); ; {
		var (
			text json.RawMessage
			one  event
		)
		err := lines.Decode(&text)
		if errors.Is(err, io.EOF) {
			return all, nil
		}
		if err = cmp.Or(err, decodeLoosely(text, &one)); err != nil {
			return nil, fmt.Errorf("the events: %w", err)
		}
		if all = append(all, one); len(all) > maxEntries {
			return nil, errTooMany
		}
	}
}

func unixSeconds(t time.Time) string { return strconv.FormatInt(t.Unix(), 10) }

// origin says what of an engine makes a difference for the meaning of its answers.
type origin struct {
	windows, podman bool
	cpus            uint64 // the host's, 0 where /info does not tell
	memory          uint64 // the host's, in bytes, likewise
}

// stats reads a container's stats answer into body. It asks for one-shot if the engine knows it:
// else the engine takes two samples, a second apart, for a percentage that is not used here.
// go-dockerclient's own Stats has no one-shot, so this uses its HTTP client only.
func (e *engine) stats(ctx context.Context, id string, body *answer) (from origin, err error) {
	query := "stream=false"
	if e.oneShot {
		query += "&one-shot=true"
	}
	header, err := e.get(ctx, "/containers/"+url.PathEscape(id)+"/stats?"+query, body)
	// The body has os_type only since API 1.52, and proxies leave headers out.
	from.windows = header.Get("Ostype") == "windows" || e.windows
	from.podman = header.Get("Libpod-Api-Version") != ""
	return from, err
}

// ask gets a path of the API and decodes the answer. It returns the answer's header.
func ask[T any](ctx context.Context, e *engine, path string, into *T) (http.Header, error) {
	var body answer
	header, err := e.get(ctx, path, &body)
	if err != nil {
		return nil, err
	}
	if body.scan(); body.entries > maxEntries {
		return nil, errTooMany
	}
	if err := decodeLoosely(body.text, into); err != nil {
		return nil, fmt.Errorf("the answer is not what was asked for: %w", err)
	}
	return header, nil
}

// get asks for a path of the API that go-dockerclient has no fitting call for, and reads the
// answer into body. Its errors are *apiError, noAnswer, that of a connection, or of an answer that
// breaks off or has no end.
func (e *engine) get(ctx context.Context, path string, body *answer) (http.Header, error) {
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
	if resp.StatusCode/100 != 2 {
		defer time.AfterFunc(2*linger, cancel).Stop() // the body may have no end
		return nil, newAPIError(resp, path)
	}
	if err := body.read(resp.Body, cancel); err != nil {
		return nil, cmp.Or(context.Cause(ctx), err)
	}
	if api := resp.Header.Get("Api-Version"); api != e.api && api != "" {
		e.changed.Store(true)
	}
	return resp.Header, nil
}

// apiError is an answer with a status other than 2xx.
type apiError struct {
	status        int
	path, message string
}

func newAPIError(resp *http.Response, path string) error {
	body, _ := io.ReadAll(io.LimitReader(resp.Body, maxRead)) // a proxy's can be a whole page
	var answer struct{ Message string }
	if json.Unmarshal(body, &answer) != nil {
		answer.Message = string(body)
	}
	path, _, _ = strings.Cut(path, "?")
	return &apiError{resp.StatusCode, path,
		cmp.Or(firstLine(answer.Message), http.StatusText(resp.StatusCode))}
}

func (a *apiError) Error() string {
	text := fmt.Sprintf("API error (%d): %s", a.status, a.message)
	if a.status == http.StatusForbidden {
		text += "; the engine, or a proxy before it, forbids GET " + a.path
	}
	return text
}

var errTooMany = fmt.Errorf("the answer has over %d entries", maxEntries)

// statusOf returns the status of an *apiError, 0 for another error.
func statusOf(err error) int {
	if answer := (*apiError)(nil); errors.As(err, &answer) {
		return answer.status
	}
	return 0
}

// isRefusal reports whether asking again is pointless after err.
func isRefusal(err error) bool {
	status := statusOf(err)
	isPassing := status == http.StatusRequestTimeout || status == http.StatusTooManyRequests
	return status/100 == 4 && !isPassing || status == http.StatusNotImplemented
}

var (
	// errStopped says that a container stopped between the list and the stats call.
	errStopped = errors.New("it stopped while it was asked")
	// errUnknown is errStopped at the second poll in a row.
	errUnknown = errors.New("the engine's list has it, poll after poll, but the engine does not " +
		"know it or says that it stopped")
	// errRestarting says that a container waits to be started again by its restart policy.
	errRestarting = errors.New("it waits to be restarted")
	// errNoTime is the error of an answer such as {"message":"no metrics received"}: Docker 26 says
	// that of a container whose process has just ended.
	errNoTime = errors.New("its stats answer has no time of reading")
)

// isConnectionError reports whether err came before there was an answer, and is no timeout: the
// engine may be in trouble, and not the container.
func isConnectionError(err error) bool { return errors.As(err, new(*foreign)) }

// engineHint returns what to do about an engine that cannot be reached, after "; ", or nothing.
func engineHint(err error) string {
	says := func(text string) bool { return strings.Contains(err.Error(), text) }
	var op *net.OpError
	if errors.As(err, &op) && op.Net == "unix" && op.Addr != nil {
		found, err := os.Stat(op.Addr.String())
		switch {
		case err != nil:
		case found.IsDir():
			return "; that is a folder, not the engine's socket"
		case found.Mode().IsRegular():
			return "; that is a plain file, not the engine's socket"
		}
	}
	switch {
	case errors.Is(err, fs.ErrPermission):
		if os.Getenv("container") != "" { // as the image sets it
			return "; give the container the group of the socket: " +
				"--group-add $(stat -c %g /var/run/docker.sock)"
		}
		return "; add this user to the group that owns the socket, and log in again: " +
			"usermod -aG docker USER"
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, docker.ErrConnectionRefused),
		says("refused"), says("no such host"):
		if name, endpoint := dockerContext(); endpoint != "" && errors.Is(err, fs.ErrNotExist) {
			return fmt.Sprintf("; the Docker context %q has another engine: --docker=%s",
				fit(name, maxForeign), fit(endpoint, maxForeign))
		}
		return "; is Docker running, and is --docker its address?"
	case lacksTLS(err):
		return "; the engine does not speak TLS there: use http:// or unset DOCKER_TLS_VERIFY"
	case isNoHTTP(err), says("HTTP request to an HTTPS server"):
		return "; does the engine want TLS there? Set DOCKER_TLS_VERIFY=1 and DOCKER_CERT_PATH"
	case statusOf(err) == http.StatusNotFound, errors.As(err, new(*json.SyntaxError)):
		return "; is --docker the address of a Docker engine?"
	}
	return ""
}
