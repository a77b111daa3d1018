// A request of a second.
const SECOND_MS = 1000;
const ANSWER = JSON.stringify({id: 'bench', object: 'text_completion', model: 'tiny'});

function answer(r) {
    setTimeout(() => r.return(200, ANSWER), SECOND_MS);
}

export default {answer};
