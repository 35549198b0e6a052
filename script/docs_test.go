package script_test

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/deliverous/docker-stats-to-backstop/script/harness"
)

// Bounds of the README: who wants more reads docs.
const (
	maxReadmeLines = 150
	maxReadmeWords = 1400
)

func TestReadmeIsShort(t *testing.T) {
	readme := harness.ReadFile(t, "README.md")
	lines, words := strings.Count(readme, "\n"), len(strings.Fields(readme))
	if lines > maxReadmeLines || words > maxReadmeWords {
		t.Errorf("the README has %d lines and %d words, more than %d and %d",
			lines, words, maxReadmeLines, maxReadmeWords)
	}
	for _, page := range harness.Documents(t)[1:] {
		if !strings.Contains(readme, "]("+page+")") {
			t.Errorf("the README does not lead to %s", page)
		}
	}
}

// fenced is code in a page: lines that are indented, and what stands between backquotes.
var fenced = regexp.MustCompile("(?m)^    .*$|`[^`\n]*`")

// anchors returns those of a page's headings, as GitHub makes them.
func anchors(page string) map[string]bool {
	all := map[string]bool{}
	for _, heading := range harness.AllOf(`(?m)^#+ (.*)$`, page) {
		heading = strings.ToLower(regexp.MustCompile("[^A-Za-z0-9 _-]").ReplaceAllString(heading, ""))
		all[strings.ReplaceAll(heading, " ", "-")] = true
	}
	return all
}

// Links lead to files, and to headings, that are there.
func TestLinksLeadSomewhere(t *testing.T) {
	pages := append(harness.Documents(t), "docs/third-party.md", "CONTRIBUTING.md",
		".github/SECURITY.md")
	n := 0
	for _, page := range pages {
		text := harness.ReadFile(t, page)
		if page != "docs/third-party.md" {
			text = fenced.ReplaceAllString(text, "")
		}
		for _, link := range harness.AllOf(`\]\(([^)\s]+)\)`, text) {
			if strings.Contains(link, "://") {
				continue
			}
			n++
			path, anchor, hasAnchor := strings.Cut(link, "#")
			to := page
			if path != "" {
				to = filepath.Join(filepath.Dir(page), path)
			}
			if _, err := os.Stat(filepath.Join(harness.Top(t), to)); err != nil {
				t.Errorf("%s leads to %s: %v", page, link, err)
			} else if hasAnchor && !anchors(harness.ReadFile(t, to))[anchor] {
				t.Errorf("%s leads to %s, and there is no such heading", page, link)
			}
		}
	}
	if n < 40 {
		t.Errorf("only %d links", n)
	}
}

// The README names each metric that is sent without --per.
func TestReadmeNamesTheMetrics(t *testing.T) {
	names := func(pattern, text string) (all []string) {
		for _, braced := range harness.AllOf(pattern, text) {
			all = append(all, harness.Expand(braced)...)
		}
		return all
	}
	const row, page = "(?m)^\\| `(<[ch]>\\.[^`]+)` \\|", "docs/metrics.md"
	readme := names("`(<[ch]>\\.[^`]+)`", harness.Section(t, "README.md", "## What is sent"))
	per := names(row, harness.Section(t, page, "### With `--per`"))
	documented := names(row, harness.ReadFile(t, page))
	for _, name := range documented {
		if !slices.Contains(readme, name) && !slices.Contains(per, name) {
			t.Errorf("%s has %s, the README's table has not", page, name)
		}
	}
	for _, name := range readme {
		if !slices.Contains(documented, name) {
			t.Errorf("the README's table has %s, %s has not", name, page)
		}
	}
	if len(readme) < 60 {
		t.Errorf("only %d metrics", len(readme))
	}
}

// The README's way to run the image is the one of docs/install.md, which is tried, but for the
// rule.
func TestReadmeRunsTheImageAsDocumented(t *testing.T) {
	command := func(page string) string {
		text := harness.ReadFile(t, page)
		m := regexp.MustCompile(`(?s)\n    docker run --detach.*?\n\n`).FindString(text)
		rule := regexp.MustCompile(`SRV_PREFIX='.*?'`)
		if !rule.MatchString(m) {
			t.Fatalf("%s does not run the image with a rule: %s", page, m)
		}
		return rule.ReplaceAllString(m, "")
	}
	if one, other := command("README.md"), command("docs/install.md"); one != other {
		t.Errorf("the README says\n%s\ndocs/install.md\n%s", one, other)
	}
}
