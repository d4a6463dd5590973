// Renders conversations with a Go template as Ollama's legacy form does: once a turn, the last one cut after .Response.
// In: JSON on stdin, {"template": "...", "turns": [[{"System": "", "Prompt": "", "Response": ""}, ...], ...]}.
// Out: a JSON list of the rendered texts. Standard library only: tests/test_prompt.py compares the bytes.
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
	"text/template/parse"
)

type turn struct{ System, Prompt, Response string }

func main() {
	var input struct {
		Template string
		Turns    [][]turn
	}
	check(json.NewDecoder(os.Stdin).Decode(&input))
	whole := template.Must(template.New("whole").Parse(input.Template))
	cut := template.Must(template.New("cut").Parse(input.Template))
	cutAfterResponse(cut.Tree.Root)
	texts := []string{}
	for _, turns := range input.Turns {
		var text strings.Builder
		for i, values := range turns {
			if i+1 < len(turns) {
				check(whole.Execute(&text, values))
			} else {
				check(cut.Execute(&text, values))
			}
		}
		texts = append(texts, text.String())
	}
	output := json.NewEncoder(os.Stdout)
	output.SetEscapeHTML(false)
	check(output.Encode(texts))
}

// cutAfterResponse drops what follows the action that prints .Response, at the template's top level.
func cutAfterResponse(root *parse.ListNode) {
	for i, node := range root.Nodes {
		if action, ok := node.(*parse.ActionNode); ok && action.String() == "{{.Response}}" {
			root.Nodes = root.Nodes[:i+1]
			return
		}
	}
	panic("the template prints no .Response")
}

func check(err error) {
	if err != nil {
		panic(err)
	}
}
