// The difference of two texts, word by word.

// Longer texts are compared by their common beginning and end alone.
const MOST_CELLS = 4_000_000;

// Split a text into words and the blanks between them.
function splitWords(text) {
  return text.match(/\s+|[\p{L}\p{M}\p{N}_]+|[^\s\p{L}\p{M}\p{N}_]/gu) ?? [];
}

// The parts of two texts, [{text, changed}] each: what is not changed is in both, in the same order.
function compareTexts(before, after) {
  const [a, b] = [splitWords(before), splitWords(after)];
  let start = 0;
  while (start < a.length && start < b.length && a[start] === b[start]) start++;
  let end = 0;
  while (end < a.length - start && end < b.length - start && a[a.length - 1 - end] === b[b.length - 1 - end])
    end++;

  const [middleA, middleB] = [a.slice(start, a.length - end), b.slice(start, b.length - end)];
  const [keptA, keptB] = findCommonWords(middleA, middleB);
  const mark = (words, kept) => {
    const changed = words.map(
      (_, index) => index >= start && index < words.length - end && !kept.has(index - start),
    );
    return joinParts(words, changed);
  };
  return [mark(a, keptA), mark(b, keptB)];
}

// The indices of a longest common subsequence in both lists.
function findCommonWords(a, b) {
  const kept = [new Set(), new Set()];
  if (a.length * b.length > MOST_CELLS) return kept;
  // lengths[i][j]: that of the common subsequence of a from i and b from j.
  const width = b.length + 1;
  const lengths = new Uint16Array((a.length + 1) * width);
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      const skipped = Math.max(lengths[(i + 1) * width + j], lengths[i * width + j + 1]);
      lengths[i * width + j] = a[i] === b[j] ? lengths[(i + 1) * width + j + 1] + 1 : skipped;
    }
  }
  let [i, j] = [0, 0];
  while (i < a.length && j < b.length) {
    if (a[i] === b[j]) {
      kept[0].add(i++);
      kept[1].add(j++);
    } else if (lengths[(i + 1) * width + j] >= lengths[i * width + j + 1]) i++;
    else j++;
  }
  return kept;
}

// Join neighbouring words of the same kind.  Blanks between two changed words are marked with them.
function joinParts(words, changed) {
  const marked = changed.map(
    (isChanged, index) =>
      isChanged || (/^\s+$/.test(words[index]) && Boolean(changed[index - 1]) && Boolean(changed[index + 1])),
  );
  const parts = [];
  words.forEach((word, index) => {
    const last = parts[parts.length - 1];
    if (last && last.changed === marked[index]) last.text += word;
    else parts.push({ text: word, changed: marked[index] });
  });
  return parts;
}

// The text of a pair's member, with what the other member does not have in `del` (positive) or `ins` (negative).
function makeMarkedText(parts, tag) {
  const nodes = parts.map((part) =>
    part.changed ? make(tag, {}, textNodes(part.text)) : textNodes(part.text),
  );
  return make("div", { class: "text", dir: "auto" }, nodes);
}
