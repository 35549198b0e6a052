package main

import (
	"cmp"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// rules are what --prefix says. The first rule that matches a container counts: it makes the path
// of the container's metrics. If none matches, the path is made of the container's name.
type rules []rule

type rule struct {
	from     string // what the regexp sees: "name", "image", "id", or "label:" and a label's key
	regexp   *regexp.Regexp
	into     string // a template of regexp.Regexp.Expand, and a bit more: see fillIn
	rename   bool   // whether there is an into
	category string // one node of a path, "" for none
	drop     bool   // whether the container is left out
}

// subject is what rules see of a container.
type subject struct {
	name   string // without Docker's leading slash
	id     string
	image  string // as given when the container was made
	labels map[string]string
}

// naming is what the rules make of a container.
type naming struct {
	path     string // of its metrics
	rule     int    // the one that matched, counted from 1; 0 for none
	category string // "" for none
	drop     bool
}

// imageID is what a list shows when the image's name means another image by now.
var imageID = regexp.MustCompile(`^(sha256:)?[0-9a-f]{12,64}$`)

// apply returns what the rules make of s on a host. Of a longer text, they see the start: a path is
// no longer, and there are labels of megabytes.
func (rs rules) apply(s subject, host string) naming {
	s.name, s.image = startOf(s.name), startOf(s.image)
	for i := range rs {
		r := &rs[i]
		text, ok := r.text(s)
		if !ok || !r.regexp.MatchString(text) {
			continue
		}
		n := naming{rule: i + 1, category: r.category, drop: r.drop}
		if r.rename {
			template, ok := fillIn(r.into, r.regexp, s, host)
			if !ok {
				continue
			}
			n.path = graphitePath(r.regexp.ReplaceAllString(text, template))
		}
		n.path = cmp.Or(n.path, ownPath(s.name))
		return n
	}
	return naming{path: ownPath(s.name)}
}

// needHost reports whether the name of the host may be in a path.
func (rs rules) needHost() bool { return slices.ContainsFunc(rs, rule.hasHost) }

// hasHost reports whether the rule with that number, counted from 1, puts it there.
func (rs rules) hasHost(number int) bool { return number > 0 && rs[number-1].hasHost() }

func (r rule) hasHost() bool {
	return strings.Contains(r.into, "${host}") || strings.Contains(r.into, "$host")
}

func (rs rules) categories() []string {
	var names []string
	for _, r := range rs {
		if r.category != "" && !slices.Contains(names, r.category) {
			names = append(names, r.category)
		}
	}
	return names
}

// text returns what the regexp sees of s. ok is false if s lacks the label.
func (r *rule) text(s subject) (text string, ok bool) {
	switch r.from {
	case "image": // one that is only an id has no name
		return s.image, s.image != "" && !imageID.MatchString(s.image)
	case "id":
		return s.id, true
	case "name":
		return s.name, true
	}
	return s.label(strings.TrimPrefix(r.from, "label:"))
}

// label returns the start of a label. ok is false if s lacks it.
func (s subject) label(key string) (text string, ok bool) {
	text, ok = s.labels[key]
	return startOf(text), ok
}

// startOf returns as much of text as a path can have.
func startOf(text string) string { return text[:min(len(text), maxPath)] }

// fillIn replaces what Expand does not know in a template: ${label:KEY}, a label of s, and ${host},
// unless re has a group of that name. Each becomes one node of a path, whatever is in it. ok is
// false if s lacks a label.
func fillIn(template string, re *regexp.Regexp, s subject, host string) (filled string, ok bool) {
	if !strings.Contains(template, "host") && !strings.Contains(template, "{label:") {
		return template, true
	}
	var b strings.Builder
	for len(template) > 0 {
		ref, length := templateRef(template)
		switch key, isLabel := strings.CutPrefix(ref, "label:"); {
		case isLabel:
			value, found := s.label(key)
			if !found {
				return "", false
			}
			b.WriteString(graphiteNode(value))
		case ref == "host" && !hasGroup(re, ref):
			b.WriteString(graphiteNode(host))
		default:
			length = max(length, 1)
			b.WriteString(template[:length])
		}
		template = template[length:]
	}
	return b.String(), true
}

// ownPath is the path of a container without a rule for it. Of dots only, it is "_".
func ownPath(name string) string { return cmp.Or(graphitePath(name), "_") }

// templateRefs matches what Expand and fillIn take for a reference.
var templateRefs = regexp.MustCompile(`^\$(?:\$|([\pL\p{Nd}_]+)|\{([\pL\p{Nd}_]+|label:[^{}]+)\})`)

// templateRef returns what a template that starts with "$" refers to: the name of a group, "host",
// "label:" and a key, or "" for "$$". length is that of the reference, 0 if it is none.
func templateRef(template string) (ref string, length int) {
	m := templateRefs.FindStringSubmatch(template)
	if m == nil {
		return "", 0
	}
	return m[1] + m[2], len(m[0])
}

func hasGroup(re *regexp.Regexp, group string) bool {
	// For Expand, $01 is a group named "01".
	if n, err := strconv.Atoi(group); err == nil && strconv.Itoa(n) == group {
		return n <= re.NumSubexp()
	}
	return re.SubexpIndex(group) >= 0
}
